"""Which position of the sequence is what, and which pixels each image token covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original image


@dataclass(frozen=True)
class Tile:
    """A grid of `rows` x `cols` image tokens, row by row, over `box` of the original image."""

    rows: int
    cols: int
    box: Box

    def token_boxes(self) -> np.ndarray:
        """The pixel box of each token, float64 [rows * cols, 4]."""
        left, top, right, bottom = self.box
        x = np.linspace(left, right, self.cols + 1)
        y = np.linspace(top, bottom, self.rows + 1)
        lefts, tops = np.meshgrid(x[:-1], y[:-1])
        rights, bottoms = np.meshgrid(x[1:], y[1:])
        return np.stack([lefts, tops, rights, bottoms], -1).reshape(-1, 4)


@dataclass(frozen=True)
class ImageLayout:
    """One image of a prompt: the `positions` of its tokens (int64 [n]), the `size` (width, height) of the
    original image, and its tiles in the order of the tokens. `canvas` counts the tiles that form one
    image side by side, (rows, cols) of tiles; a thumbnail follows them where the family has one."""

    positions: torch.Tensor
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    canvas: tuple[int, int] = (1, 1)

    def token_boxes(self) -> np.ndarray:
        """The pixel box of each token in the original image, float64 [n, 4]."""
        return np.concatenate([tile.token_boxes() for tile in self.tiles])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the finest grid: the tiles of the canvas side by side."""
        return self.tiles[0].rows * self.canvas[0], self.tiles[0].cols * self.canvas[1]

    @property
    def box(self) -> Box:
        """The part of the original image that the grid covers (a centre crop leaves a rest)."""
        boxes = np.array([tile.box for tile in self.tiles[: self.canvas[0] * self.canvas[1]]])
        left, top = boxes[:, :2].min(0)
        right, bottom = boxes[:, 2:].max(0)
        return float(left), float(top), float(right), float(bottom)

    def to_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Token values [..., n] laid on the finest grid [..., rows, cols].

        A thumbnail's tokens cover several cells: each spreads its value over them by area, so that the sum
        over the grid is the sum over the tokens.
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
    """[fine, coarse]: the share of each coarse interval that lies in each fine one; columns sum to 1."""
    return torch.from_numpy(overlaps(np.linspace(0, 1, fine + 1), np.linspace(0, 1, coarse + 1)) * coarse)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Lengths of the overlaps of the intervals between edges `a` and those between edges `b`: [len(a) - 1,
    len(b) - 1]."""
    low = np.maximum(a[:-1, None], b[None, :-1])
    high = np.minimum(a[1:, None], b[None, 1:])
    return np.clip(high - low, 0, None)


@dataclass(frozen=True)
class TokenLayout:
    """The segments of one sequence. `length` counts every token, `prompt_length` those before the answer.

    Segments: "system" (before the first image), "image" ("image:0", "image:1", ... its parts), "query"
    (prompt text after the first image), "generated".
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
        """Read from the ids: the k-th run of image tokens, as long as the k-th image's tiles say.

        Args:
            input_ids: int64 [N], one sequence without padding.
            image_token_id: the processor's image token.
            images: for each image its (width, height), its tiles and its canvas.
            prompt_length: tokens before the answer; all by default.
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
        """Read from the ids of a prompt, int64 [N], alone; its images have no size and no tiles.

        lengths: how many tokens each image has. By default each run of image tokens is an image.
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
        """Name -> positions, int64. Every position is in one of system, image, query, generated."""
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
        """Positions of a segment, int64."""
        segments = self.segments
        if segment not in segments:
            raise ValueError(f"segment is one of {', '.join(segments)}, got {segment!r}")
        return segments[segment]
