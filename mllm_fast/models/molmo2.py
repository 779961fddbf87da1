"""Molmo 2: a coarse view of the whole image, then a finer one that its overlapping crops make together."""

from __future__ import annotations

from typing import Any

from ..core.layout import Tile, Tiling
from .adapter import Adapter
from .architectures import architecture


@architecture
class Molmo2(Adapter):
    """Molmo 2, whose processor gives the rows and columns of both views."""

    model_types = ("molmo2",)

    def tiles(self, processor: Any, inputs: Any, index: int, size: tuple[int, int]) -> Tiling:
        coarse_rows, coarse_cols, rows, cols = (int(n) for n in inputs["image_grids"][index])
        whole = (0.0, 0.0, float(size[0]), float(size[1]))
        fine = Tile(rows, cols, whole)
        if coarse_rows * coarse_cols == 0:
            return Tiling((fine,))
        return Tiling((Tile(coarse_rows, coarse_cols, whole), fine), first=1)
