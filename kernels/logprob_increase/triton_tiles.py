"""The device code of `triton_kernel`: products of tiles of words with a block of writes, and a running log-sum-exp.

All exponents are in powers of two, x = base + d in bits, so that no exponential needs a multiplication of its own. Each
program has one block of writes and one share of the vocabulary. It writes log2 of the sum over its share. If the
explained token lies in its share, it also writes the d of that word, so that the numerator and the denominator come
from the same products.
"""

# ruff: noqa: N803  constants of the compilation are written in capitals, as all Triton code does
from __future__ import annotations

import triton
import triton.language as tl

from ..dispatch import interpreted

_INTERPRETED = tl.constexpr(interpreted())
# sums between these limits err by rounding alone, because terms lost below 2 ** -126 are negligible beside them
LEAST, MOST = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)
_MINUS_2_LOG2E = tl.constexpr(-2.8853900817779268)  # 2 ** (this * z) = exp(-2 z)


@triton.jit
def _tanh(z):
    """Return tanh(z), to one or two roundings of 1; equal z give equal bits, so that a zero write changes nothing."""
    power = tl.exp2(tl.abs(z) * _MINUS_2_LOG2E)
    size = (1 - power) / (1 + power)
    return tl.where(z < 0, -size, size)


@triton.jit
def _change(products, factor, shift, lean, before, gain, OWN: tl.constexpr, CAP: tl.constexpr):
    """Return the change d of the logits, in bits.

    `products` times `factor` is the part of the write, and `shift` times `lean` the part of the norm's scale. With a
    cap, `factor` and `shift` are divided by the cap, `before` is the logit over the cap, and `gain` is the cap in bits.
    """
    d = products * factor
    if OWN:
        d += shift * lean
    if CAP:
        d = gain * (_tanh(before + d) - _tanh(before))
    return d


@triton.jit
def _products(left, right, fits, known, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute left [BLOCK_R, DEPTH] times right [DEPTH, BLOCK_V].

    `left` points to the first BLOCK_K columns, `right` to the first BLOCK_K rows.
    """
    depth = tl.arange(0, BLOCK_K)
    products = tl.zeros([left.shape[0], right.shape[1]], tl.float32)
    for step in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            write = tl.load(left + step, mask=fits[:, None], other=0.0)
            tile = tl.load(right + step, mask=known[None, :], other=0.0)
        else:
            inside = depth + step < DEPTH
            write = tl.load(left + step, mask=fits[:, None] & inside[None, :], other=0.0)
            tile = tl.load(right + step, mask=known[None, :] & inside[:, None], other=0.0)
        products += dot(write, tile)
    return products


@triton.jit
def _column(products, column, BLOCK_V: tl.constexpr):
    """Return the product of each row with its explained word, at `column`, or 0 where the tile does not hold it."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_V)[None, :] == column, products, 0.0), 1)


@triton.jit
def _add(x, peak, total):
    """Return the running maximum and the running sum of 2 ** (x - maximum) after one more tile x."""
    new = tl.maximum(peak, tl.max(x, 1))
    level = tl.where(new == float("-inf"), 0.0, new)  # the maximum is -inf if all words so far have probability 0
    total = total * tl.exp2(peak - level) + tl.sum(tl.exp2(x - level[:, None]), 1)
    return new, total


@triton.jit
def dot(a, b):
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")  # three products on the tensor cores: nearly float32
    return tl.dot(a, b)


@triton.jit
def _share(
    write,
    left,
    operator,
    base,
    lean,
    before,
    scale,
    lift,
    gain,
    height,
    fits,
    token,
    start,
    stop,
    vocab,
    CAREFUL: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWN: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return the level, the sum of 2 ** (x - level), and the products of the explained word, over words start .. stop.

    The level is `height`, or with CAREFUL the maximum of each row.
    """
    depth = tl.arange(0, BLOCK_K)
    inside = depth < DEPTH
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    found = tl.zeros([BLOCK_R], tl.float32)
    for first in range(start, stop, BLOCK_V):
        word = first + tl.arange(0, BLOCK_V)
        known = word < vocab
        right = operator + word.to(tl.int64)[None, :] * DEPTH + depth[:, None]
        if BLOCK_K == DEPTH:
            products = dot(write, tl.load(right, mask=known[None, :], other=0.0))
        elif BLOCK_K > DEPTH:
            products = dot(write, tl.load(right, mask=known[None, :] & inside[:, None], other=0.0))
        else:
            products = _products(left, right, fits, known, DEPTH, BLOCK_K)
        level = tl.load(base + word, mask=known, other=float("-inf"))
        slope = tl.load(lean + word, mask=known, other=0.0)[None, :] if OWN else level[None, :]
        logit = tl.load(before + word, mask=known, other=0.0)[None, :] if CAP else level[None, :]
        if (token >= first) & (token < first + BLOCK_V):
            found = _column(products, token - first, BLOCK_V)
        d = _change(products, scale[:, None], lift[:, None], slope, logit, gain, OWN, CAP)
        if CAREFUL:
            peak, total = _add(level[None, :] + d, peak, total)
        else:
            total += tl.sum(tl.exp2((level - height)[None, :] + d), 1)
    if not CAREFUL:
        peak = tl.zeros_like(peak) + height
    return peak, total, found


@triton.jit(do_not_specialize=["groups", "rows", "vocab", "share"])
def factored(  # long: one kernel, whose parts share registers
    writes,  # [groups, rows, DEPTH]
    factor,  # [groups, rows]
    shift,  # [groups, rows]
    operators,  # int64 [groups]: addresses of [vocab, DEPTH]
    source,  # int64 [groups]
    tokens,  # int64 [B]
    base,  # [B, vocab]
    lean,  # [B, vocab]
    before,  # [B, vocab]
    gain,
    picked,  # [groups, rows]
    sums,  # [splits, groups, rows]
    order,  # int32 [groups, rows]: with LISTED, the rows to do come first
    counts,  # int32 [groups]: with LISTED, the number of rows to do
    groups,
    rows,
    vocab,
    share,  # words per split, a multiple of BLOCK_V
    DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWN: tl.constexpr,
    CAP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Compute the increase with an operator for each group.

    The block of writes stays on the chip if BLOCK_K covers the depth.
    """
    blocks = tl.cdiv(rows, BLOCK_R)
    block = tl.program_id(0) % blocks  # the fastest index, so that blocks of a group share its operator in the cache
    group = tl.program_id(0) // blocks % groups
    split = tl.program_id(0) // blocks // groups
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    fits = row < rows
    if LISTED:
        count = tl.load(counts + group)
        if block * BLOCK_R >= count:
            return
        fits = row < count
        row = tl.load(order + group.to(tl.int64) * rows + row, mask=fits, other=0)
    place = group.to(tl.int64) * rows + row
    depth = tl.arange(0, BLOCK_K)
    left = writes + place[:, None] * DEPTH + depth
    inside = depth < DEPTH
    if BLOCK_K == DEPTH:
        write = tl.load(left, mask=fits[:, None], other=0.0)
    elif BLOCK_K > DEPTH:
        write = tl.load(left, mask=fits[:, None] & inside[None, :], other=0.0)
    scale = tl.load(factor + place, mask=fits, other=0.0)
    lift = tl.load(shift + place, mask=fits, other=0.0) if OWN else scale
    operator = tl.load(operators + group).to(tl.pointer_type(writes.dtype.element_ty))
    operator = tl.multiple_of(operator, 16)  # each operator has its own allocation; see operators.make_operator
    origin = tl.load(source + group)
    token = tl.load(tokens + origin).to(tl.int32)
    base += origin * vocab
    lean += origin * vocab
    before += origin * vocab
    if BLOCK_K < DEPTH:
        write = scale  # unused, because the block of writes is read again for each tile
    # One level for all rows replaces the running maximum of each row: a third of the work beside the products. The
    # first words of the share set the level. If a row ends far from it, the careful sum is made. With a cap the
    # careful sum is always made, because the other work is large and registers are few.
    word = split * share + tl.arange(0, BLOCK_V)
    height = tl.max(tl.load(base + word, mask=word < vocab, other=float("-inf")), 0)
    height = tl.where(height == float("-inf"), 0.0, height)
    peak, total, found = _share(
        write, left, operator, base, lean, before, scale, lift, gain, height, fits, token, split * share,
        min(split * share + share, vocab), vocab, CAP, DEPTH, BLOCK_R, BLOCK_V, BLOCK_K, OWN, CAP,
    )  # fmt: skip
    if not CAP:
        near = (total >= LEAST) & (total <= MOST)  # false for NaN
        if tl.max((fits & ~near).to(tl.int32), 0) != 0:
            peak, total, found = _share(
                write, left, operator, base, lean, before, scale, lift, gain, height, fits, token, split * share,
                min(split * share + share, vocab), vocab, True, DEPTH, BLOCK_R, BLOCK_V, BLOCK_K, OWN, CAP,
            )  # fmt: skip
    if (token >= split * share) & (token < split * share + share):
        slope = tl.load(lean + token) if OWN else 0.0
        logit = tl.load(before + token) if CAP else 0.0
        tl.store(picked + place, _change(found, scale, lift, slope, logit, gain, OWN, CAP), mask=fits)
    tl.store(sums + split.to(tl.int64) * groups * rows + place, peak + tl.log2(total), mask=fits)


@triton.jit(do_not_specialize=["rows", "vocab", "share", "splits"])
def direct(  # long: one kernel, whose parts share registers
    writes,  # [rows, DEPTH]
    factor,  # [rows]
    shift,  # [rows]
    operand,  # [vocab, DEPTH]
    order,  # int64 [rows]: the rows sorted by residual vector
    source,  # int64 [rows]: residual vectors of the rows in that order
    tokens,  # int64 [B]
    base,  # [B, vocab]
    lean,  # [B, vocab]
    before,  # [B, vocab]
    gain,
    picked,  # [rows]
    sums,  # [splits, rows]
    rows,
    vocab,
    share,  # words per split, a multiple of BLOCK_V
    splits,
    DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    OWN: tl.constexpr,
    CAP: tl.constexpr,
):
    """Compute the increase with one operand of any depth for all rows; a block may mix several residual vectors."""
    # BAND blocks of rows go through all shares before the next ones, so that concurrent programs fit the cache
    blocks = tl.cdiv(rows, BLOCK_R)
    start = tl.program_id(0) // (BAND * splits) * BAND
    height = min(blocks - start, BAND)
    within = tl.program_id(0) % (BAND * splits)
    split = within // height
    row = (start + within % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    fits = row < rows
    place = tl.load(order + row, mask=fits, other=0)
    origin = tl.load(source + row, mask=fits, other=-1)
    highest = tl.max(origin, 0)
    lowest = tl.min(tl.where(fits, origin, highest), 0)
    scale = tl.load(factor + place, mask=fits, other=0.0)
    lift = tl.load(shift + place, mask=fits, other=0.0) if OWN else scale
    depth = tl.arange(0, BLOCK_K)
    token = tl.load(tokens + origin, mask=fits, other=-1).to(tl.int32)
    left = writes + place[:, None] * DEPTH + depth
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    found = tl.zeros([BLOCK_R], tl.float32)
    column = tl.arange(0, BLOCK_V)
    for first in range(split * share, min(split * share + share, vocab), BLOCK_V):
        word = first + column
        known = word < vocab
        right = operand + word.to(tl.int64)[None, :] * DEPTH + depth[:, None]
        x = _products(left, right, fits, known, DEPTH, BLOCK_K)
        found += _column(x, token[:, None] - first, BLOCK_V)
        # most often there is one vector; a gather of base by row would hold a second tile in registers
        for vector in range(lowest, highest + 1):
            mine = origin == vector
            at = vector * vocab + first  # one address for all words
            level = tl.load(base + at + column, mask=known, other=float("-inf"))[None, :]
            slope = tl.load(lean + at + column, mask=known, other=0.0)[None, :] if OWN else level
            logit = tl.load(before + at + column, mask=known, other=0.0)[None, :] if CAP else level
            d = _change(x, scale[:, None], lift[:, None], slope, logit, gain, OWN, CAP)
            x = tl.where(mine[:, None], level + d, x)
        peak, total = _add(x, peak, total)
    here = (token >= split * share) & (token < split * share + share)
    slope = tl.load(lean + origin * vocab + token, mask=here, other=0.0) if OWN else 0.0
    logit = tl.load(before + origin * vocab + token, mask=here, other=0.0) if CAP else 0.0
    tl.store(picked + place, _change(found, scale, lift, slope, logit, gain, OWN, CAP), mask=here)
    tl.store(sums + split.to(tl.int64) * rows + place, peak + tl.log2(total), mask=fits)
