"""The layout of a sequence: the segment of each position, and the pixels that each image token covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original image


@dataclass(frozen=True)
class Tile:
    """A grid of `rows` x `cols` image tokens, in row-major order, over `box` of the original image."""

    rows: int
    cols: int
    box: Box

    def token_boxes(self) -> np.ndarray:
        """Return the pixel box of each token, float64 [rows * cols, 4]."""
        left, top, right, bottom = self.box
        x = np.linspace(left, right, self.cols + 1)
        y = np.linspace(top, bottom, self.rows + 1)
        lefts, tops = np.meshgrid(x[:-1], y[:-1])
        rights, bottoms = np.meshgrid(x[1:], y[1:])
        return np.stack([lefts, tops, rights, bottoms], -1).reshape(-1, 4)


@dataclass(frozen=True)
class ImageLayout:
    """One image of a prompt.

    Attributes:
        positions: Positions of the image's tokens, int64 [n].
        size: (width, height) of the original image.
        tiles: The tiles in the order of their tokens.
        canvas: How many tiles lie side by side to form the image, (rows, cols). In some architectures a thumbnail
            follows them.
    """

    positions: torch.Tensor
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    canvas: tuple[int, int] = (1, 1)

    def token_boxes(self) -> np.ndarray:
        """Return the pixel box of each token in the original image, float64 [n, 4]."""
        return np.concatenate([tile.token_boxes() for tile in self.tiles])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the finest grid, which consists of the tiles of the canvas side by side."""
        return self.tiles[0].rows * self.canvas[0], self.tiles[0].cols * self.canvas[1]

    @property
    def box(self) -> Box:
        """The part of the original image that the grid covers; a centre crop leaves out the margins."""
        boxes = np.array([tile.box for tile in self.tiles[: self.canvas[0] * self.canvas[1]]])
        left, top = boxes[:, :2].min(0)
        right, bottom = boxes[:, 2:].max(0)
        return float(left), float(top), float(right), float(bottom)

    def to_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Lay token values [..., n] on the finest grid [..., rows, cols].

        A token of a thumbnail covers several cells. Its value is spread over them by area, so that the sum over the
        grid equals the sum over the tokens.
        """
        lead = values.shape[:-1]
        down, across = self.canvas
        first = self.tiles[0]
        count = first.rows * first.cols
        tiles = values[..., : down * across * count].reshape(*lead, down, across, first.rows, first.cols)
        grid = tiles.transpose(-3, -2).reshape(*lead, down * first.rows, across * first.cols)
        start = down * across * count
        for tile in self.tiles[down * across :]:
            part = values[..., start : start + tile.rows * tile.cols].reshape(*lead, tile.rows, tile.cols)
            rows = _spread(tile.rows, grid.shape[-2]).to(values)
            cols = _spread(tile.cols, grid.shape[-1]).to(values)
            grid = grid + rows @ part @ cols.T
            start += tile.rows * tile.cols
        return grid


def _spread(coarse: int, fine: int) -> torch.Tensor:
    """Return the share of each coarse interval that lies in each fine one, [fine, coarse]; the columns sum to 1."""
    return torch.from_numpy(overlaps(np.linspace(0, 1, fine + 1), np.linspace(0, 1, coarse + 1)) * coarse)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how much the intervals between two lists of edges overlap, [len(a) - 1, len(b) - 1]."""
    low = np.maximum(a[:-1, None], b[None, :-1])
    high = np.minimum(a[1:, None], b[None, 1:])
    return np.clip(high - low, 0, None)


@dataclass(frozen=True)
class TokenLayout:
    """The segments of one sequence.

    The segments are "system" (before the first image), "image" (with "image:0", "image:1", ... as its parts), "query"
    (prompt text after the first image) and "generated".

    Attributes:
        length: How many tokens the sequence has.
        prompt_length: How many tokens precede the answer.
        images: The layout of each image.
    """

    length: int
    prompt_length: int
    images: tuple[ImageLayout, ...]

    @classmethod
    def from_input_ids(
        cls,
        input_ids: torch.Tensor,
        image_token_id: int,
        images: Sequence[tuple[tuple[int, int], tuple[Tile, ...], tuple[int, int]]],
        prompt_length: int | None = None,
    ) -> TokenLayout:
        """Find the tokens of each image in the ids of a sequence.

        The image tokens are assigned to the images in order. Each image gets as many as its tiles have.

        Args:
            input_ids: int64 [N], one sequence without padding.
            image_token_id: The processor's image token.
            images: (width, height), tiles and canvas of each image.
            prompt_length: How many tokens precede the answer; all by default.

        Raises:
            ValueError: The number of image tokens differs from that of the tiles.
        """
        where = (input_ids == image_token_id).nonzero()[:, 0].cpu()
        layouts, at = [], 0
        for size, tiles, canvas in images:
            count = sum(tile.rows * tile.cols for tile in tiles)
            positions = where[at : at + count]
            layouts.append(ImageLayout(positions, size, tiles, canvas))
            at += count
        if at != len(where):
            raise ValueError(
                f"the sequence holds {len(where)} image tokens, the images' grids count {at}: the processor's"
                " settings and the adapter disagree"
            )
        length = len(input_ids)
        return cls(length, length if prompt_length is None else prompt_length, tuple(layouts))

    @classmethod
    def from_prompt_ids(
        cls, input_ids: torch.Tensor, image_token_id: int, lengths: Sequence[int] | None = None
    ) -> TokenLayout:
        """Find the tokens of each image in the ids of a prompt alone; the images have no size and no tiles.

        Args:
            input_ids: int64 [N], one prompt without padding.
            image_token_id: The processor's image token.
            lengths: How many tokens each image has. By default each run of image tokens is one image.
        """
        where = (input_ids == image_token_id).nonzero()[:, 0].cpu()
        if lengths is None:
            ends = (where.diff() > 1).nonzero()[:, 0] + 1
            parts = where.tensor_split(ends) if len(where) else ()
        else:
            parts = where.split(list(lengths))
        return cls(len(input_ids), len(input_ids), tuple(ImageLayout(part, (0, 0), ()) for part in parts))

    @property
    def segments(self) -> dict[str, torch.Tensor]:
        """The positions of each segment, by name, int64.

        Every position is in exactly one of "system", "image", "query" and "generated".
        """
        image = torch.cat([i.positions for i in self.images]) if self.images else torch.empty(0, dtype=torch.long)
        first = int(image.min()) if len(image) else self.prompt_length
        prompt = torch.arange(self.prompt_length)
        text = torch.ones(self.prompt_length, dtype=torch.bool)
        text[image] = False
        named = {
            "system": prompt[:first],
            "image": image,
            "query": prompt[first:][text[first:]],
            "generated": torch.arange(self.prompt_length, self.length),
        }
        named |= {f"image:{i}": layout.positions for i, layout in enumerate(self.images)}
        return named

    def positions(self, segment: str) -> torch.Tensor:
        """Return the positions of a segment, int64."""
        segments = self.segments
        if segment not in segments:
            raise ValueError(f"segment is one of {', '.join(segments)}, got {segment!r}")
        return segments[segment]
