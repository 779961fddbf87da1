"""The increase on a GPU, numerator and log-sum-exp in one kernel: all groups of the factored way in one launch.

Both operands of a product are in the unembedding's type: the writes are rounded to it, each row in units of its own
power of two, so that small writes lose no more than large ones. float32 runs on the tensor cores too, as three
products of tf32 (2^-21 or so, against 2^-24).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_tiles
from .base import Base
from .operators import Operators, held_together
from .triton_rounding import rounded_writes

_LOG2E = 1 / math.log(2)
_MADE_BYTES = 1 << 30  # of operators outside the cache that one launch keeps alive
BAND = 8  # blocks of rows, see triton_tiles.direct


class Config(NamedTuple):
    """Rows, words and depth of a tile; warps; pipeline stages; programs a multiprocessor gets, in about two waves."""

    block_r: int
    block_v: int
    block_k: int
    warps: int
    stages: int
    programs: int


def config(dtype: torch.dtype, depth: int, way: str, plain: bool) -> Config:
    """Tile sizes, one set for every GPU from sm_80 on, the fastest of these on an H200. `plain`: neither the norm's own
    scale nor a cap, whose vectors take registers."""
    if dtype == torch.float32:  # the three products need their operands in halves: shallow tiles
        return Config(128, 64, 32, 8, 3, 2)
    if way == "direct":
        return Config(128, 128 if plain else 64, 64, 8, 3, 2)
    if depth % 8:  # rows that no vector load can take
        return Config(128, 32, 32, 8, 3, 2)
    if depth > 256:
        return Config(128, 64, 64, 8, 3, 2)
    if plain and depth <= 128:
        return Config(64, 64, max(16, triton.next_power_of_2(depth)), 4, 3, 8)
    return Config(128, 64, max(16, triton.next_power_of_2(depth)), 8, 3 if depth <= 128 else 2, 4)


def increase(
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: Tensor | Operators,
    shift: Tensor | None,
    source: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """See `torch_kernel.increase`; everything in float32. `splits` cuts the vocabulary so (tests), else as the GPU is
    best filled."""
    if not values.shape[0] * values.shape[1]:
        return values.new_empty(values.shape[:2])
    source = base.each(source)
    problem = _Problem(base, splits)
    rounded, factor = rounded_writes(values, gain, base.scale, shift, source, operands.dtype, problem.unit)
    if isinstance(operands, Tensor):
        return problem.direct(rounded, factor, operands, shift, source)
    out = torch.empty_like(factor)
    # memory given back after a launch is used again in the stream's order
    for part, held in held_together(operands, _MADE_BYTES):
        lift = None if shift is None else shift[part]
        out[part] = problem.factored(rounded[part], factor[part], held, lift, source[part])
    return out


class _Problem:
    """The vectors of B residual vectors in the kernels' units: bits, or multiples of the cap."""

    def __init__(self, base: Base, splits: int | None):
        self.base, self.splits = base, splits
        self.unit = _LOG2E if base.cap is None else 1 / base.cap
        self.gain = 0.0 if base.cap is None else base.cap * _LOG2E
        self.logs = base.log_probs * _LOG2E
        self.lean = base.lean.contiguous()
        self.before = self.logs if base.cap is None else base.raw / base.cap
        self.tokens = base.tokens.contiguous()

    def factored(
        self, rounded: Tensor, factor: Tensor, operators: list[Tensor], shift: Tensor | None, source: Tensor
    ) -> Tensor:
        """S [G, R] of writes [G, R, k], `rounded` times `factor` [G, R], with an operator [V, k] for each group."""
        groups, rows, depth = rounded.shape
        dtype, vocab = operators[0].dtype, len(operators[0])
        tile = config(dtype, depth, "factored", shift is None and self.base.cap is None)
        blocks = groups * triton.cdiv(rows, tile.block_r)
        splits, share = self._split(tile, blocks, vocab, rounded.device)
        picked = torch.empty_like(factor)
        sums = factor.new_empty(splits, groups, rows)
        addresses = torch.tensor([one.data_ptr() for one in operators], device=rounded.device)
        with torch.cuda.device_of(rounded):
            triton_tiles.factored[(blocks * splits,)](
                rounded, factor, self._shift(shift, factor), addresses, source.contiguous(), self.tokens,
                self.logs, self.lean, self.before, self.gain, picked, sums, groups, rows, vocab, share,
                **self._constants(tile, depth, shift),
            )  # fmt: skip
        return _merged(picked, sums)

    def direct(self, rounded: Tensor, factor: Tensor, operand: Tensor, shift: Tensor | None, source: Tensor) -> Tensor:
        """S [G, R] of writes [G, R, d], `rounded` times `factor` [G, R], with the operand [V, d]."""
        depth, vocab = rounded.shape[2], len(operand)
        rows = factor.numel()
        tile = config(operand.dtype, depth, "direct", shift is None and self.base.cap is None)
        blocks = triton.cdiv(rows, tile.block_r)
        splits, share = self._split(tile, min(blocks, BAND), vocab, rounded.device)
        picked = torch.empty_like(factor)
        sums = factor.new_empty(splits, *factor.shape)
        # a block of rows goes through the residual vectors between its first and its last: sorted, they are few
        sorted_source, order = torch.sort(source, stable=True)
        place = order[:, None] * factor.shape[1] + torch.arange(factor.shape[1], device=factor.device)
        origin = sorted_source[:, None].expand_as(place).contiguous()
        with torch.cuda.device_of(rounded):
            triton_tiles.direct[(blocks * splits,)](
                rounded, factor, self._shift(shift, factor), operand.contiguous(), place, origin, self.tokens,
                self.logs, self.lean, self.before, self.gain, picked, sums, rows, vocab, share, splits,
                BAND=BAND, **self._constants(tile, depth, shift),
            )  # fmt: skip
        return _merged(picked, sums)

    def _split(self, tile: Config, programs: int, vocab: int, device: torch.device) -> tuple[int, int]:
        """How many shares of the vocabulary, and the words of each: whole tiles, and no share empty."""
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        tiles = triton.cdiv(vocab, tile.block_v)
        wanted = self.splits or triton.cdiv(tile.programs * processors, programs)
        each = triton.cdiv(tiles, min(wanted, tiles))
        return triton.cdiv(tiles, each), each * tile.block_v

    def _shift(self, shift: Tensor | None, unused: Tensor) -> Tensor:
        return unused if shift is None else (shift * self.unit).contiguous()

    def _constants(self, tile: Config, depth: int, shift: Tensor | None) -> dict[str, int | bool]:
        return {
            "DEPTH": depth,
            "BLOCK_R": tile.block_r,
            "BLOCK_V": tile.block_v,
            "BLOCK_K": tile.block_k,
            "OWN": shift is not None,
            "CAP": self.base.cap is not None,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }


def _merged(picked: Tensor, sums: Tensor) -> Tensor:
    """S from the explained word's change and the sums of the shares, both in bits."""
    total = sums[0] if len(sums) == 1 else torch.logsumexp(sums / _LOG2E, 0) * _LOG2E
    return (picked - total) / _LOG2E
