"""The log-sum-exp of small writes from two moments of the words' changes, without an exponential for each word.

With p at h, d_v the change of the logit of word v by a write, and b the explained word, the increase is

    S = d_b - log sum_v p_v exp(d_v) = -(m + log(1 + s / 2 + r)),   m = sum p (d - d_b),   s = variance of d under p

by Taylor's theorem about the mean of d. Lagrange's remainder is |r| <= c exp(c) s / 6, where c bounds the distance of
any d_v from the mean. In the factored way d_v = w . M_v, so that the sums over the words in m = w . sum p (M_v - M_b)
and in the second moment w^T (sum p (M_v - M_b) M_v^T) w serve all writes w of a head. c is |w| max |M_v| plus the
size of the mean. If a write has k numbers, the sums over the words cost as much as k writes, less their exponentials.

The error of S is at most c exp(c) s / 6. A write is done if this is within one rounding of an operand, relative to the
deviation sqrt(s). The other writes are listed for `triton_tiles.factored`; NaN and infinity are among them. The
roundings of the summands come on top: p (M - M_b) is in the dtype of the operands, like M and w.
"""

# ruff: noqa: N803  constants of the compilation are written in capitals, as all Triton code does
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .triton_rounding import INTERPRETED, round_to
from .triton_tiles import dot

_LN2, _LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
_MOST_DEPTH = 128  # largest depth of a head at which the moments stay in registers
LEAST_WORK = 1 << 27  # exponentials; with fewer, launches take all the time, and the moments need two more of them
BLOCK_R, WARPS = 32, 4  # for `expand`; with more, Triton 3.6 cannot compile it for sm_100


class Config(NamedTuple):
    """The tile size and the launch options of `moments`.

    Attributes:
        block_v: Words of a tile.
        warps: Warps of a program.
        stages: Pipeline stages.
        registers: Registers that a thread may have.
        programs: Programs that each multiprocessor gets, in about two waves.
    """

    block_v: int
    warps: int
    stages: int
    registers: int
    programs: int


def config(capability: tuple[int, int]) -> Config:
    """Return the tile of `moments` for a GPU of this compute capability."""
    if capability[0] in (9, 10):
        return Config(64, 8, 4, 128, 4)
    return Config(32, 4, 4, 255, 4)  # both operands of the older products are in registers


def serves(dtype: torch.dtype, depth: int, groups: int, rows: int, vocab: int) -> bool:
    """Return whether the moments pay off, for writes in a dtype whose rounding leaves room for the remainder."""
    fits = dtype.itemsize == 2 and depth <= _MOST_DEPTH and depth % 8 == 0
    return fits and rows >= 2 * depth and groups * rows * vocab >= LEAST_WORK


@triton.jit
def _weighted(tile, explained, chance):
    """Return chance (tile - explained), with each step rounded to the dtype of the operands."""
    if INTERPRETED:  # the interpreter would take the bit patterns of bfloat16 for numbers
        less = round_to(tile.to(tl.float32) - explained.to(tl.float32), tile.dtype)
        return round_to(less.to(tl.float32) * chance.to(tl.float32), tile.dtype)
    return (tile - explained) * chance


@triton.jit(do_not_specialize=["groups", "vocab", "share"])
def moments(
    writes,  # used for its dtype only
    operators,  # int64 [groups]: addresses of [vocab, DEPTH]
    source,  # int64 [groups]
    tokens,  # int64 [B]
    base,  # [B, vocab], in bits
    first,  # [splits, groups, DEPTH]
    second,  # [splits, groups, DEPTH, DEPTH]
    groups,
    vocab,
    share,  # words per split, a multiple of BLOCK_V
    DEPTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute sum p (M - M_b) and sum p (M - M_b) M^T over a share of the words."""
    dtype: tl.constexpr = writes.dtype.element_ty
    lift: tl.constexpr = 12 if dtype == tl.float16 else 0  # in bits; keeps likely words above float16's smallest number
    group = tl.program_id(0) % groups
    split = tl.program_id(0) // groups
    operator = tl.load(operators + group).to(tl.pointer_type(dtype))
    operator = tl.multiple_of(operator, 16)
    origin = tl.load(source + group)
    base += origin * vocab
    depth = tl.arange(0, BLOCK_K)
    inside = depth < DEPTH
    token = tl.load(tokens + origin)
    explained = tl.load(operator + token * DEPTH + depth, mask=inside & (token >= 0), other=0.0)
    ones = tl.full([BLOCK_V, 16], 1.0, tl.float32).to(dtype)  # the interpreter of Triton 3.8 makes no bfloat16
    mean = tl.zeros([BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    begin = split * share
    stop = min(begin + share, vocab)
    ahead = begin + tl.arange(0, BLOCK_V)
    level = tl.load(base + ahead, mask=ahead < stop, other=float("-inf"))
    for start in range(begin, stop, BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        known = word < stop
        at = operator + word.to(tl.int64)[:, None] * DEPTH + depth[None, :]
        if BLOCK_K == DEPTH:
            tile = tl.load(at, mask=known[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
        # the next tile's log-probabilities are loaded now, because nothing else hides the wait for them
        ahead = word + BLOCK_V
        later = tl.load(base + ahead, mask=ahead < stop, other=float("-inf"))
        chance = round_to(tl.exp2(level + lift), dtype)
        part = _weighted(tl.trans(tile), explained[:, None], chance[None, :])
        square += dot(part, tile)
        # This is the narrowest product there is; all its columns are equal. Using its result at once makes the program
        # wait for it and for the product before it. Triton would let a product that is only added up run on while its
        # tile is overwritten.
        mean += tl.max(dot(part, ones), 1)
        level = later
    back: tl.constexpr = 2.0**-12 if dtype == tl.float16 else 1.0
    place = (split * groups + group).to(tl.int64)
    row = tl.arange(0, BLOCK_K)[:, None]
    tl.store(first + place * DEPTH + depth, mean * back, mask=inside)
    tl.store(second + (place * DEPTH + row) * DEPTH + depth, square * back, mask=(row < DEPTH) & inside)


@triton.jit(do_not_specialize=["groups", "rows", "vocab", "splits", "shares"])
def expand(  # long: one kernel, whose parts share registers
    writes,  # [groups, rows, DEPTH]
    factor,  # [groups, rows]: factors that bring the writes back, in bits
    operators,  # int64 [groups]: addresses of operators that have the length of their longest row behind them
    source,  # int64 [groups]
    tokens,  # int64 [B]
    first,  # [splits, groups, DEPTH]
    second,  # [splits, groups, DEPTH, DEPTH]
    picked,  # [groups, rows]
    sums,  # [shares, groups, rows]
    order,  # int32 [groups, rows]: the rows that are left come first
    counts,  # int32 [groups]: number of rows that are left
    groups,
    rows,
    vocab,
    splits,
    shares,
    rounding,  # relative rounding of an operand
    DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the increase of the small writes of a group, and list the rows of the others.

    A small write gets 0 as picked and -S as log2 of the sum, so that their difference is S.
    """
    group = tl.program_id(0)
    depth = tl.arange(0, BLOCK_K)
    inside = depth < DEPTH
    deep = tl.arange(0, BLOCK_K)[:, None]
    mean = tl.zeros([BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for split in range(0, splits):
        place = (split * groups + group).to(tl.int64)
        mean += tl.load(first + place * DEPTH + depth, mask=inside, other=0.0)
        at = second + (place * DEPTH + deep) * DEPTH + depth
        square += tl.load(at, mask=(deep < DEPTH) & inside, other=0.0)
    square = square.to(tl.bfloat16)
    operator = tl.load(operators + group).to(tl.pointer_type(writes.dtype.element_ty))
    longest = tl.load((operator + vocab.to(tl.int64) * DEPTH).to(tl.pointer_type(tl.float32)))
    token = tl.load(tokens + tl.load(source + group))
    explained = tl.load(operator + token * DEPTH + depth, mask=inside & (token >= 0), other=0.0).to(tl.float32)
    left = 0
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        fits = row < rows
        place = group.to(tl.int64) * rows + row
        write = tl.load(writes + place[:, None] * DEPTH + depth, mask=fits[:, None] & inside, other=0.0)
        power = tl.load(factor + place, mask=fits, other=0.0) * _LN2
        wide = write.to(tl.float32)
        m = power * tl.sum(wide * mean, 1)
        centre = m + power * tl.sum(wide * explained, 1)
        raw = power * power * tl.sum(dot(write.to(tl.bfloat16), square) * wide, 1)
        spread = raw - m * centre
        spread = tl.where(spread < 0, 0.0, spread)  # NaN stays
        most = power * tl.sqrt(tl.sum(wide * wide, 1)) * longest + tl.abs(centre)
        # the second moment is a sum of rounded numbers, hence the allowance for their rounding
        deviation = tl.sqrt(spread + 4 * rounding * tl.abs(raw))
        small = fits & (most * tl.exp2(most * _LOG2E) * deviation <= 6 * rounding)
        y = 0.5 * spread  # y is small, and the series of the logarithm keeps its digits
        change = m + y * (1 - y * (1 / 2 - y * (1 / 3 - y / 4)))
        tl.store(picked + place, tl.zeros_like(change), mask=small)
        kept = change * _LOG2E
        at = sums + place
        for _ in range(0, shares):  # the first share gets the whole sum, the others -inf
            tl.store(at, kept, mask=small)
            kept = tl.zeros_like(kept) + float("-inf")
            at += groups * rows
        listed = (fits & ~small).to(tl.int32)
        tl.store(order + group.to(tl.int64) * rows + left + tl.cumsum(listed, 0) - 1, row, mask=listed != 0)
        left += tl.sum(listed, 0)
    tl.store(counts + group, left)
