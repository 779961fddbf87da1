"""The increase on a GPU, with the numerator and the log-sum-exp in one kernel.

All groups of the factored way run in one launch. Both operands of a product are in the dtype of the unembedding. The
writes are rounded to it, each row in units of its own power of two, so that small writes lose no more precision than
large ones. float32 runs on the tensor cores too, as three products of tf32 (2^-21 or so, against 2^-24).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..triton_target import RELEASE, chip
from . import triton_moments, triton_tiles
from .base import Base
from .operators import Operators, Together, held_together
from .triton_rounding import rounded_writes

_LOG2E = 1 / math.log(2)
_MADE_BYTES = 1 << 30  # bytes of operators outside the cache that one launch keeps alive
_LEFT = 4  # only the GPU knows how long a list of rows is, so a listed launch is split for a quarter of all rows
BAND = 8  # blocks of rows; see triton_tiles.direct


class Config(NamedTuple):
    """The tile sizes and the launch options of a kernel.

    Attributes:
        block_r: Rows of a tile.
        block_v: Words of a tile.
        block_k: Depth of a tile.
        warps: Warps of a program.
        stages: Pipeline stages.
        programs: Programs that each multiprocessor gets, in about two waves.
        registers: Registers that a thread may have, or None. Without a limit the assembler may spill a few bytes to
            fit one more program.
    """

    block_r: int
    block_v: int
    block_k: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


def config(
    dtype: torch.dtype, depth: int, way: str, capability: tuple[int, int], *, own: bool = False, cap: bool = False
) -> Config:
    """Return the tile sizes of a kernel for a GPU from sm_80 on.

    No register spills with these sizes, which tests/test_triton_scores_aot.py checks. They are the fastest of such
    sizes on an H200.

    Args:
        dtype: Dtype of the operands.
        depth: Numbers of a write.
        way: "direct" or "factored".
        capability: Compute capability of the GPU.
        own: Whether the norm has its own scale after each write, which needs vectors of words in registers.
        cap: Whether there is a soft cap, which needs such vectors too.
    """
    plain = not (own or cap)
    if way == "direct":
        # a thread of sm_100 holds a whole row of the tile, and so the vectors of all words of the tile
        rows = 64 if cap or (own and capability[0] == 10) else 128
        if dtype == torch.float32:
            return Config(rows, 32, 32, 8, 3, 2, registers=255) if own and cap else Config(rows, 64, 32, 8, 3, 2)
        return Config(rows, 128 if plain else 64, 64, 8, 3, 2)
    if dtype == torch.float32:  # the three products need their operands in halves, so the tiles are shallow
        return Config(128, 64, 32, 8, 3, 2)
    if depth % 8:  # no vector load can read these rows
        return Config(128, 32, 32, 8, 3, 2, 255 if RELEASE < (3, 7) else None)
    if depth > 256:
        return Config(128, 64, 64, 8, 3, 2)
    if plain and depth <= 128:
        return Config(64, 64, block_k(depth), 4, 3, 8)
    return Config(128, 64, block_k(depth), 8, 3 if depth <= 128 else 2, 4, None if depth <= 128 else 255)


def block_k(depth: int) -> int:
    """Return the depth of a tile that covers the depth of a head, a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(depth))


def increase(
    base: Base,
    values: Tensor,
    gain: Tensor | None,
    operands: Tensor | Operators,
    shift: Tensor | None,
    source: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """Compute `torch_kernel.increase` in float32.

    `splits` is the number of parts of the vocabulary (for tests); None selects the number that fills the GPU best.
    """
    if not values.shape[0] * values.shape[1]:
        return values.new_empty(values.shape[:2])
    source = base.each(source)
    problem = _Problem(base, splits)
    rounded, factor = rounded_writes(values, gain, base.scale, shift, source, operands.dtype, problem.unit)
    if isinstance(operands, Tensor):
        return problem.direct(rounded, factor, operands, shift, source)
    out = torch.empty_like(factor)
    # memory freed after a launch may be reused at once, because the stream keeps the order
    for part, held in held_together(operands, _MADE_BYTES):
        lift = None if shift is None else shift[part]
        out[part] = problem.factored(rounded[part], factor[part], held, lift, source[part])
    return out


class _Problem:
    """The vectors of words of B residual vectors, in the units of the kernels: bits, or multiples of the cap."""

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
        """Return S [G, R] of writes `rounded` [G, R, k] times `factor` [G, R], with an operator [V, k] per group."""
        groups, rows, depth = rounded.shape
        dtype, vocab = operators[0].dtype, len(operators[0])
        plain = shift is None and self.base.cap is None
        tile = self._tile(dtype, depth, "factored", rounded.device, shift)
        blocks = groups * triton.cdiv(rows, tile.block_r)
        listed = plain and triton_moments.serves(dtype, depth, groups, rows, vocab)
        splits, share = self._split(tile, triton.cdiv(blocks, _LEFT) if listed else blocks, vocab, rounded.device)
        picked = torch.zeros_like(factor)  # where the token is no word nothing is picked
        sums = factor.new_empty(splits, groups, rows)
        addresses = _addresses(operators, rounded.device)
        source = source.contiguous()
        order = counts = addresses
        with torch.cuda.device_of(rounded):
            if listed:
                order, counts = self._expanded(rounded, factor, addresses, source, vocab, picked, sums)
            triton_tiles.factored[(blocks * splits,)](
                rounded, factor, self._shift(shift, factor), addresses, source, self.tokens, self.logs, self.lean,
                self.before, self.gain, picked, sums, order, counts, groups, rows, vocab, share, LISTED=listed,
                **self._constants(tile, depth, shift),
            )  # fmt: skip
        return _merged(picked, sums)

    def _expanded(
        self,
        rounded: Tensor,
        factor: Tensor,
        addresses: Tensor,
        source: Tensor,
        vocab: int,
        picked: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fill picked and sums for the small writes; return the list of the other rows [G, R] and its counts [G]."""
        groups, rows, depth = rounded.shape
        tile = triton_moments.config(chip(rounded.device)[0])
        sizes = {"DEPTH": depth, "BLOCK_K": block_k(depth), "enable_fp_fusion": True}
        splits, share = self._split(tile, groups, vocab, rounded.device)
        first, second = factor.new_empty(splits, groups, depth), factor.new_empty(splits, groups, depth, depth)
        triton_moments.moments[(groups * splits,)](
            rounded, addresses, source, self.tokens, self.logs, first, second, groups, vocab, share,
            BLOCK_V=tile.block_v, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **sizes,
        )  # fmt: skip
        order = torch.empty(groups, rows, dtype=torch.int32, device=rounded.device)
        counts = order.new_empty(groups)
        triton_moments.expand[(groups,)](
            rounded, factor, addresses, source, self.tokens, first, second, picked, sums, order, counts,
            groups, rows, vocab, splits, len(sums), torch.finfo(rounded.dtype).eps / 2,
            BLOCK_R=triton_moments.BLOCK_R, num_warps=triton_moments.WARPS, **sizes,
        )  # fmt: skip
        return order, counts

    def direct(self, rounded: Tensor, factor: Tensor, operand: Tensor, shift: Tensor | None, source: Tensor) -> Tensor:
        """Return S [G, R] of the writes `rounded` [G, R, d] times `factor` [G, R], with the operand [V, d]."""
        depth, vocab = rounded.shape[2], len(operand)
        rows = factor.numel()
        tile = self._tile(operand.dtype, depth, "direct", rounded.device, shift)
        blocks = triton.cdiv(rows, tile.block_r)
        splits, share = self._split(tile, min(blocks, BAND), vocab, rounded.device)
        picked = torch.zeros_like(factor)  # where the token is no word nothing is picked
        sums = factor.new_empty(splits, *factor.shape)
        # a block of rows goes through all residual vectors between its first and its last; sorting makes them few
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

    def _split(
        self, tile: Config | triton_moments.Config, programs: int, vocab: int, device: torch.device
    ) -> tuple[int, int]:
        """Return the number of shares of the vocabulary and the words of each: whole tiles, with no share empty."""
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        tiles = triton.cdiv(vocab, tile.block_v)
        wanted = self.splits or triton.cdiv(tile.programs * processors, programs)
        each = triton.cdiv(tiles, min(wanted, tiles))
        return triton.cdiv(tiles, each), each * tile.block_v

    def _tile(self, dtype: torch.dtype, depth: int, way: str, device: torch.device, shift: Tensor | None) -> Config:
        own, cap = shift is not None, self.base.cap is not None
        return config(dtype, depth, way, chip(device)[0], own=own, cap=cap)

    def _shift(self, shift: Tensor | None, unused: Tensor) -> Tensor:
        return unused if shift is None else (shift * self.unit).contiguous()

    def _constants(self, tile: Config, depth: int, shift: Tensor | None) -> dict[str, int | bool | None]:
        return {
            "DEPTH": depth,
            "BLOCK_R": tile.block_r,
            "BLOCK_V": tile.block_v,
            "BLOCK_K": tile.block_k,
            "OWN": shift is not None,
            "CAP": self.base.cap is not None,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
            "enable_fp_fusion": True,
        }


def _addresses(operators: list[Tensor], device: torch.device) -> Tensor:
    """Return the addresses of the operators on the device, int64 [G]."""
    if not isinstance(operators, Together):
        return torch.tensor([one.data_ptr() for one in operators], device=device)
    if operators.table is None:
        operators.table = torch.tensor([one.data_ptr() for one in operators], device=device)
    return operators.table


def _merged(picked: Tensor, sums: Tensor) -> Tensor:
    """Return S from the change of the explained word's logit and the sums of the shares, both in bits."""
    total = sums[0] if len(sums) == 1 else torch.logsumexp(sums / _LOG2E, 0) * _LOG2E
    return (picked - total) / _LOG2E
