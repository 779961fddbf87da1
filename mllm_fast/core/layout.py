"""The layout of a sequence: the segment of each position, and the pixels that each image token covers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import InputError
from .moments import Moment, moment_of, named_moments

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original image


@dataclass(frozen=True)
class Tile:
    """A grid of `rows` x `cols` image tokens, in row-major order, over `box` of the original image.

    With `row_ends` one more image token follows each row, which stands for no part of the image.
    """

    rows: int
    cols: int
    box: Box
    row_ends: bool = False

    @property
    def num_tokens(self) -> int:
        """How many image tokens the tile takes, row ends included."""
        return self.rows * (self.cols + self.row_ends)

    def token_boxes(self) -> np.ndarray:
        """Return the pixel box of each token, float64 [rows * cols, 4]."""
        left, top, right, bottom = self.box
        x = np.linspace(left, right, self.cols + 1)
        y = np.linspace(top, bottom, self.rows + 1)
        lefts, tops = np.meshgrid(x[:-1], y[:-1])
        rights, bottoms = np.meshgrid(x[1:], y[1:])
        return np.stack([lefts, tops, rights, bottoms], -1).reshape(-1, 4)


def side_by_side(rows: int, cols: int, tile: tuple[int, int], size: tuple[int, int]) -> tuple[Tile, ...]:
    """Return equal tiles that cover an image, row by row.

    Args:
        rows, cols: How many tiles lie below and beside each other.
        tile: (rows, cols) of the tokens of each.
        size: (width, height) of the image in pixels.
    """
    (down, across), (width, height) = tile, size
    return tuple(
        Tile(down, across, (c * width / cols, r * height / rows, (c + 1) * width / cols, (r + 1) * height / rows))
        for r in range(rows)
        for c in range(cols)
    )


class Tiling(NamedTuple):
    """How the tokens of one image lie.

    Attributes:
        tiles: The tiles in the order of their tokens.
        canvas: How many tiles lie side by side to form the image, (rows, cols). They are of one size.
        first: Index of the first of them. The other tiles are views of the whole image or of parts of it.
    """

    tiles: tuple[Tile, ...]
    canvas: tuple[int, int] = (1, 1)
    first: int = 0


@dataclass(frozen=True)
class ImageLayout:
    """One image of a prompt, or one moment of a video.

    Attributes:
        positions: Positions of the image's tokens, int64 [n].
        size: (width, height) of the original image.
        tiles: The tiles in the order of their tokens. Empty if it is not known how the tokens lie.
        canvas: How many tiles lie side by side to form the image, (rows, cols). In some architectures a thumbnail
            precedes or follows them.
        first: Index of the first tile of the canvas.
        moment: Which part of which video the tokens show; None for a still image.
    """

    positions: torch.Tensor
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    canvas: tuple[int, int] = (1, 1)
    first: int = 0
    moment: Moment | None = None

    def token_at(self, x: float, y: float) -> int | None:
        """Return the image token (its number in the image) whose box holds a pixel; of several the smallest box.

        It is None where no token lies.
        """
        boxes = self.token_boxes()
        inside = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
        if not inside.any():
            return None
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        area[~inside] = float("inf")
        return int(area.argmin())

    def token_boxes(self) -> np.ndarray:
        """Return the pixel box of each token in the original image, float64 [n, 4]."""
        return np.concatenate([tile.token_boxes() for tile in self.known_tiles])

    @property
    def known_tiles(self) -> tuple[Tile, ...]:
        """The tiles.

        Raises:
            InputError: It is not known how the tokens lie.
        """
        if not self.tiles:
            raise InputError(
                "how this model's processor lays out image tokens is not known, so heatmaps and boxes cannot be drawn;"
                " scores, knockouts and contexts work. To add it, see docs/extending.md, 'An architecture'"
            )
        return self.tiles

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the finest grid, which consists of the tiles of the canvas side by side."""
        tile = self.known_tiles[self.first]
        return tile.rows * self.canvas[0], tile.cols * self.canvas[1]

    @property
    def box(self) -> Box:
        """The part of the original image that the grid covers; a centre crop leaves out the margins."""
        count = self.canvas[0] * self.canvas[1]
        boxes = np.array([tile.box for tile in self.known_tiles[self.first : self.first + count]])
        left, top = boxes[:, :2].min(0)
        right, bottom = boxes[:, 2:].max(0)
        return float(left), float(top), float(right), float(bottom)

    def to_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Lay token values [..., n] on the finest grid [..., rows, cols].

        A token of a tile that is not on the canvas covers several cells. Its value is spread over them by area, so that
        the sum over the grid equals the sum over the tokens that lie inside it.
        """
        lead, (height, width) = values.shape[:-1], self.grid
        down, across = self.canvas
        grid, start = values.new_zeros(*lead, height, width), 0
        for i, tile in enumerate(self.tiles):
            part = values[..., start : start + tile.rows * tile.cols].reshape(*lead, tile.rows, tile.cols)
            start += tile.rows * tile.cols
            place = i - self.first
            if 0 <= place < down * across:
                row, col = place // across * tile.rows, place % across * tile.cols
                grid[..., row : row + tile.rows, col : col + tile.cols] += part
                continue
            left, top, right, bottom = self.box
            rows = _spread((tile.box[1], tile.box[3], tile.rows), (top, bottom, height)).to(values)
            cols = _spread((tile.box[0], tile.box[2], tile.cols), (left, right, width)).to(values)
            grid = grid + rows @ part @ cols.T
        return grid


def _spread(coarse: tuple[float, float, int], fine: tuple[float, float, int]) -> torch.Tensor:
    """Return the share of each coarse interval that lies in each fine one, [fine, coarse].

    Each side is (start, stop, count) of intervals of one length.
    """
    start, stop, count = coarse
    shares = overlaps(np.linspace(*fine[:2], fine[2] + 1), np.linspace(start, stop, count + 1)) * count / (stop - start)
    return torch.from_numpy(shares)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how much the intervals between two lists of edges overlap, [len(a) - 1, len(b) - 1]."""
    low = np.maximum(a[:-1, None], b[None, :-1])
    high = np.minimum(a[1:, None], b[None, 1:])
    return np.clip(high - low, 0, None)


@dataclass(frozen=True)
class TokenLayout:
    """The segments of one sequence.

    The segments are "system" (before the first image), "image" (with "image:0", "image:1", ... as its parts),
    "image_separator" (row ends, tile marks, and tokens that open or close an image), "timestamp" (text that a processor
    writes beside the frames of a video), "query" (other prompt text after the first image) and "generated".

    Each moment of a video is an image here. "video" are the image tokens of all videos, "video:0" those of one,
    "frame:12" and "frame:12-20" those that show frames of the source, "time:3.0-5.5" and "time:3" those of moments.
    "video:0/frame:12" is a frame of one video.

    Attributes:
        length: How many tokens the sequence has.
        prompt_length: How many tokens precede the answer.
        images: The layout of each image, and of each moment of a video, in the order of their tokens.
        separators: Positions of the tokens that belong to an image but stand for no part of it, int64.
        timestamps: Positions of the text that a processor writes beside the frames of a video, int64.
    """

    length: int
    prompt_length: int
    images: tuple[ImageLayout, ...]
    separators: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    timestamps: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @classmethod
    def from_input_ids(
        cls,
        input_ids: torch.Tensor,
        image_token_id: int | Collection[int],
        images: Sequence[tuple[Any, ...]],
        prompt_length: int | None = None,
        separator_ids: Collection[int] = (),
    ) -> TokenLayout:
        """Find the tokens of each image in the ids of a sequence.

        The image tokens are assigned to the images in order. Each image gets as many as its tiles have.

        Args:
            input_ids: int64 [N], one sequence without padding.
            image_token_id: The processor's image token; or several, if the frames of videos have another one.
            images: The size (width, height) of each image, or moment of a video, followed by the parts of its `Tiling`
                and, for a moment, by its `Moment`.
            prompt_length: How many tokens precede the answer; all by default.
            separator_ids: Tokens that open, close or divide an image.

        Raises:
            ValueError: The number of image tokens differs from that of the tiles.
        """
        where = _tokens(input_ids, image_token_id)
        layouts, parts, at = [], [], 0
        for size, *rest in images:
            moment = rest.pop() if rest and isinstance(rest[-1], Moment) else None
            tiles, canvas, first = Tiling(*rest)
            ends = torch.tensor([end for tile in tiles for end in _row_ends(tile)], dtype=torch.bool)
            parts.append(where[at : at + len(ends)])
            positions = parts[-1][~ends[: len(parts[-1])]]
            layouts.append(ImageLayout(positions, size, tiles, canvas, first, moment))
            at += len(ends)
        if at != len(where):
            raise ValueError(
                f"the sequence holds {len(where)} image tokens, the images' grids count {at}: the processor's"
                " settings and the adapter disagree"
            )
        length = len(input_ids)
        prompt_length = length if prompt_length is None else prompt_length
        separators = _separators(input_ids[:prompt_length].cpu(), layouts, parts, separator_ids)
        return cls(length, prompt_length, tuple(layouts), separators, _between(layouts, parts, separators))

    @classmethod
    def from_prompt_ids(
        cls,
        input_ids: torch.Tensor,
        image_token_id: int | Collection[int],
        lengths: Sequence[int] | None = None,
        separator_ids: Collection[int] = (),
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> TokenLayout:
        """Find the tokens of each image in the ids of a prompt alone; the images have no tiles.

        Args:
            input_ids: int64 [N], one prompt without padding.
            image_token_id: The processor's image token; or several, if the frames of videos have another one.
            lengths: How many tokens each image has. By default each run of image tokens and separators is one image.
            separator_ids: Tokens that open, close or divide an image.
            sizes: The size of each image, if it is known.

        Raises:
            ValueError: There are not as many images as sizes.
        """
        ids = input_ids.cpu()
        where = _tokens(ids, image_token_id)
        outside = torch.ones(len(ids), dtype=torch.bool)
        outside[where] = False
        if lengths is not None:
            parts: Sequence[torch.Tensor] = where.split(list(lengths))
        elif sizes is not None and len(sizes) == 1:
            parts = [where]
        else:
            separator = torch.isin(ids, torch.tensor(sorted(separator_ids), dtype=ids.dtype))
            # runs of image tokens alone; or, where those are rows of an image, runs with the separators inside
            parts = _runs(where, outside)
            if sizes is not None and len(parts) != len(sizes):
                parts = _runs(where, outside & ~separator)
        if sizes is not None and len(parts) != len(sizes):
            raise ValueError(
                f"the sequence holds {len(parts)} runs of image tokens for {len(sizes)} images, so it is not known"
                " which tokens are whose"
            )
        each = [(0, 0)] * len(parts) if sizes is None else sizes
        layouts = [ImageLayout(part, size, ()) for part, size in zip(parts, each, strict=True)]
        return cls(len(ids), len(ids), tuple(layouts), _separators(ids, layouts, parts, separator_ids))

    @property
    def segments(self) -> dict[str, torch.Tensor]:
        """The positions of each segment, by name, int64; those of frames and times are found by `positions`.

        Every position is in exactly one of "system", "image", "image_separator", "timestamp", "query" and "generated",
        and in exactly one of "image_block", "text" and "generated": a block is an image with what lies between its
        tokens (row ends, marks between tiles), and the text is the rest of the prompt.
        """
        image = torch.cat([i.positions for i in self.images]) if self.images else torch.empty(0, dtype=torch.long)
        first = int(image.min()) if len(image) else self.prompt_length
        prompt = torch.arange(self.prompt_length)
        text = torch.ones(self.prompt_length, dtype=torch.bool)
        text[image] = False
        text[self.separators] = False
        text[self.timestamps] = False
        named = {
            "system": prompt[:first][text[:first]],
            "image": image,
            "image_separator": self.separators,
            "query": prompt[first:][text[first:]],
            "generated": torch.arange(self.prompt_length, self.length),
        }
        block = torch.zeros(self.prompt_length, dtype=torch.bool)
        for layout in self.images:
            block[int(layout.positions.min()) : int(layout.positions.max()) + 1] = True
        named |= {"image_block": prompt[block], "text": prompt[~block]}
        named |= {f"image:{i}": layout.positions for i, layout in enumerate(self.images)}
        if self.videos:
            named["timestamp"] = self.timestamps
            each = [torch.cat([self.images[i].positions for i in moments]) for moments in self.videos]
            named |= {"video": torch.cat(each), **{f"video:{i}": one for i, one in enumerate(each)}}
        return named

    def at_moments(self, moments: Sequence[Moment | None]) -> TokenLayout:
        """Return the same layout with the moment of each image, and the text between those of a video."""
        if not any(moments):
            return self
        images = [replace(image, moment=moment) for image, moment in zip(self.images, moments, strict=True)]
        between = _between(images, [image.positions for image in images], self.separators)
        return replace(self, images=tuple(images), timestamps=between)

    @property
    def videos(self) -> tuple[tuple[int, ...], ...]:
        """The moments of each video, as indices of `images`, in the order of time."""
        found: dict[int, list[int]] = {}
        for i, image in enumerate(self.images):
            if image.moment is not None:
                found.setdefault(image.moment.video, []).append(i)
        return tuple(tuple(found[video]) for video in sorted(found))

    def positions(self, segment: str) -> torch.Tensor:
        """Return the positions of a segment, int64.

        Raises:
            InputError: There is no such segment, or no frame that the model read lies there.
        """
        segments = self.segments
        if segment in segments:
            return segments[segment]
        if self.videos:
            return torch.cat([self.images[i].positions for i in self.moments(segment)])
        raise InputError(f"segment is one of {', '.join(segments)}, got {segment!r}")

    def moments(self, segment: str) -> tuple[int, ...]:
        """Return the moments of videos that a segment such as "frame:12" or "time:3.0-5.5" names.

        Returns:
            Indices of `images`.

        Raises:
            InputError: The text is no such segment, or no frame that the model read lies there.
        """
        return named_moments([image.moment for image in self.images], segment, self.segments)


def _tokens(ids: torch.Tensor, image_token_id: int | Collection[int]) -> torch.Tensor:
    """Return where the image tokens lie in the ids of a sequence."""
    known = [image_token_id] if isinstance(image_token_id, int) else sorted(image_token_id)
    return torch.isin(ids.cpu(), torch.tensor(known, dtype=ids.dtype)).nonzero()[:, 0]


def _between(images: Sequence[ImageLayout], parts: Sequence[torch.Tensor], separators: torch.Tensor) -> torch.Tensor:
    """Return the positions of the text between the moments of a video."""
    found = [torch.empty(0, dtype=torch.long)]
    for (image, part), (after, next_part) in pairwise(zip(images, parts, strict=True)):
        if image.moment is not None and after.moment is not None and image.moment.video == after.moment.video:
            found.append(torch.arange(int(part[-1]) + 1, int(next_part[0])))
    every = torch.cat(found)
    return every[~torch.isin(every, separators)]


def _runs(where: torch.Tensor, outside: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the positions `where`, cut at each position that is `outside` between two of them."""
    before = torch.cumsum(outside, 0)[where]
    return where.tensor_split(before.diff().nonzero()[:, 0] + 1) if len(where) else ()


def _row_ends(tile: Tile) -> list[bool]:
    """Return of each token of a tile whether it is a row end."""
    return ([False] * tile.cols + [True] * tile.row_ends) * tile.rows


def _separators(
    ids: torch.Tensor,
    images: Sequence[ImageLayout],
    parts: Sequence[torch.Tensor],
    separator_ids: Collection[int],
) -> torch.Tensor:
    """Return the positions of separators: those between the tokens of an image, and those of the given ids.

    Args:
        ids: int64 [N], one prompt.
        images: The images.
        parts: The image tokens of each image, row ends included.
        separator_ids: Tokens that open, close or divide an image.
    """
    mark = torch.isin(ids, torch.tensor(sorted(separator_ids), dtype=ids.dtype))
    for image, part in zip(images, parts, strict=True):
        if len(part):
            mark[int(part[0]) : int(part[-1]) + 1] = True
            mark[image.positions] = False
    return mark.nonzero()[:, 0]


def plain_images(images: Sequence[ImageLayout]) -> list[dict[str, Any]]:
    """Return the layouts of images as data for JSON, from which `images_of` makes them again."""
    return [
        {
            "positions": image.positions.tolist(),
            "size": image.size,
            "tiles": [
                {"rows": t.rows, "cols": t.cols, "box": [float(x) for x in t.box]} for t in image.tiles if t.cols
            ],
            "canvas": image.canvas,
            "first": image.first,
            **({} if image.moment is None else {"moment": image.moment._asdict()}),
        }
        for image in images
    ]


def images_of(plain: Sequence[dict[str, Any]]) -> tuple[ImageLayout, ...]:
    """Return the layouts of images that `plain_images` wrote down."""
    return tuple(
        ImageLayout(
            torch.tensor(image["positions"]),
            tuple(image["size"]),
            tuple(Tile(tile["rows"], tile["cols"], tuple(tile["box"])) for tile in image["tiles"]),
            tuple(image["canvas"]),
            image.get("first", 0),
            moment_of(image.get("moment")),
        )
        for image in plain
    )
