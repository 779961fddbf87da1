"""The Triton kernels of the attention itself: `attend` goes through the key blocks that its rows see with an online
softmax, `combine` puts together what several programs made of one row block. Which blocks segments and padding leave
open each program finds itself (`survey`): a list in memory costs a launch, and every block's address a wait.

Rows of a program: m = 0 .. packed * R, query head m // R, position N - R + m % R. A prefill packs one head, a decode
step all heads that share a key head, which fills the tensor cores' 16 rows and reads each key once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dispatch import interpreted

INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SPLIT_TILE = tl.constexpr(16)

# lengths change from call to call and must not compile a kernel anew
LENGTHS = ["rows", "keys", "before", "segment_stride", "splits"]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # noqa: N803
    """a @ b + acc (if not None) in float32; `PRECISION` tells how float32 operands are multiplied."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sees(position, words, first, key, ids, HAS_SEGMENTS: tl.constexpr):  # noqa: N803
    """Which of the keys each row sees, bool [rows, keys]; `words` are the table's entries of the rows."""
    seen = (key[None, :] <= position[:, None]) & (key >= first)[None, :]
    if HAS_SEGMENTS:
        seen = seen & (((words[:, None] >> ids[None, :]) & 1) == 0)
    return seen


@triton.jit
def first_bit(bits):
    """Place of the lowest bit set in an int32 other than 0: the exponent of that power of two."""
    power = (bits & (0 - bits)).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def as_bits(index, whole, partial):
    """Two sets of places as the bits of two int32, and how many are in each."""
    return (
        tl.reduce_or(tl.where(whole, 1 << index, 0), 0),
        tl.reduce_or(tl.where(partial, 1 << index, 0), 0),
        tl.sum(whole.to(tl.int32), 0),
        tl.sum(partial.to(tl.int32), 0),
    )


@triton.jit
def survey(
    segments,
    base,
    lower,
    upper,
    first,
    lowest,
    highest,
    free,
    barred,
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
):
    """Of key blocks base .. base + CHUNK, as far as they are of lower .. upper: those that rows see whole, and those
    that need a mask, as bits of two int32, and how many. The rows lie between positions lowest and highest; `free` are
    the segments that one of them sees, `barred` those that one does not see."""
    index = tl.arange(0, CHUNK)
    block = base + index
    key = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (key >= first) & (key <= highest)
    ids = tl.load(segments + key, mask=inside, other=0).to(tl.int32)
    present = tl.reduce_or(tl.where(inside, 1 << ids, 0), 1)
    is_open = ((present & free) != 0) & (block >= lower) & (block < upper)
    edge = (block * BLOCK_N + BLOCK_N - 1 > lowest) | (block * BLOCK_N < first)
    masked = edge | ((present & barred) != 0)
    return as_bits(index, is_open & ~masked, is_open & masked)


@triton.jit
def _step(
    q,
    peak,
    total,
    acc,
    key,
    value,
    key_stride,
    value_stride,
    batch,
    kv_head,
    segments,
    block,
    position,
    words,
    first,
    keys,
    width,
    scale,
    MASKED: tl.constexpr,  # noqa: N803
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    DESCRIBED: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One block of keys: the running maximum [BLOCK_M] (base 2), sum [BLOCK_M] and output [BLOCK_M, BLOCK_D]."""
    n = tl.arange(0, BLOCK_N)
    base = block * BLOCK_N
    if DESCRIBED:  # zeros beyond the last key and the width
        k = tl.reshape(key.load([batch, kv_head, base, 0]), [BLOCK_N, BLOCK_D])
        v = tl.reshape(value.load([batch, kv_head, base, 0]), [BLOCK_N, BLOCK_D])
    else:
        d = tl.arange(0, BLOCK_D)
        key_at = key + base.to(tl.int64) * key_stride + n[:, None] * key_stride + d[None, :]
        value_at = value + base.to(tl.int64) * value_stride + n[:, None] * value_stride + d[None, :]
        if MASKED:
            inside = (base + n < keys)[:, None]
            if not EVEN_D:
                inside = inside & (d < width)[None, :]
            k = tl.load(key_at, mask=inside, other=0.0)
            v = tl.load(value_at, mask=inside, other=0.0)
        elif EVEN_D:
            k = tl.load(key_at)
            v = tl.load(value_at)
        else:
            k = tl.load(key_at, mask=(d < width)[None, :], other=0.0)
            v = tl.load(value_at, mask=(d < width)[None, :], other=0.0)
    scores = dot(q, tl.trans(k), None, PRECISION)
    if MASKED:
        ids = n
        if HAS_SEGMENTS:
            ids = tl.load(segments + base + n, mask=base + n < keys, other=0).to(tl.int32)
        scores = tl.where(sees(position, words, first, base + n, ids, HAS_SEGMENTS), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    alpha = tl.exp2(scores * scale - safe[:, None])  # one fused multiply-add: the scale is positive
    fade = tl.exp2(peak - safe)
    total = total * fade + tl.sum(alpha, 1)
    acc = dot(alpha.to(v.dtype), v, acc * fade[:, None], PRECISION)
    return new_peak, total, acc


@triton.jit(do_not_specialize=LENGTHS)
def attend(
    query,
    key,
    value,
    output,
    lse,
    segments,
    table,
    start,
    scale,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    segment_stride,
    heads,
    per_kv,
    packed,
    rows,
    keys,
    before,
    width,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    WITH_LSE: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    DESCRIBED: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Grid (B * H / packed, row blocks, splits). Each split takes an even share of the key blocks and writes its own
    normalised output [splits, B, R, H, D] and log-sum-exp [splits, B, H, R]; one split's are the result. `scale`
    includes log2 e. `key` and `value` are descriptors of [B, Hkv, N, D] with blocks of [1, 1, BLOCK_N, BLOCK_D] if
    DESCRIBED, which the chip's copy engine reads without the threads' help, else addresses."""
    groups = heads // packed
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row_block = tl.num_programs(1) - 1 - tl.program_id(1)  # the rows with most keys first
    split, splits = tl.program_id(2), tl.num_programs(2)
    batches = tl.num_programs(0) // groups

    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = m < packed * rows
    head, row = group * packed + m * 0, m
    if PACKED:  # the divisions cost registers that a prefill has not
        head, row = group * packed + m // rows, m % rows
    position = tl.minimum(before + row, keys - 1)  # rows after all keys see as much as the last position
    first = tl.load(start + batch) if HAS_START else 0
    wide = batch.to(tl.int64)
    query += wide * query_batch + head.to(tl.int64)[:, None] * query_head + row.to(tl.int64)[:, None] * query_row
    inside = real[:, None] if EVEN_D else real[:, None] & (d < width)[None, :]
    q = tl.load(query + d[None, :], mask=inside, other=0.0)
    kv_head = group * packed // per_kv
    if not DESCRIBED:
        key += wide * key_batch + kv_head.to(tl.int64) * key_head
        value += wide * value_batch + kv_head.to(tl.int64) * value_head

    # this split's share of the key blocks from the padding to the last row
    lowest = tl.min(tl.where(real, position, keys), 0)
    highest = tl.max(tl.where(real, position, -1), 0)
    bottom = first // BLOCK_N
    blocks = tl.maximum(highest // BLOCK_N + 1 - bottom, 0)
    lower, upper = bottom + blocks * split // splits, bottom + blocks * (split + 1) // splits
    words = position
    if HAS_SEGMENTS:
        segments += wide * segment_stride
        live = real & (position >= first)  # padding sees nothing and must not open a block
        words = tl.load(table + tl.load(segments + position, mask=real, other=0).to(tl.int32))
        free = tl.reduce_or(tl.where(live, ~words, 0), 0)  # segments that some row sees
        barred = tl.reduce_or(tl.where(live, words, 0), 0)  # segments that some row does not see
        low, high = lower // CHUNK, (upper + CHUNK - 1) // CHUNK
    else:
        # only at both ends is a mask needed: at the padding and at the diagonal
        begin = tl.minimum(tl.maximum((first + BLOCK_N - 1) // BLOCK_N, lower), upper)
        end = tl.minimum(tl.maximum((lowest + 1) // BLOCK_N, begin), upper)
        whole, partial = end - begin, upper - lower - (end - begin)
        low, high = 0, 1

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for chunk in range(low, high):
        if HAS_SEGMENTS:
            whole_bits, partial_bits, whole, partial = survey(
                segments, chunk * CHUNK, lower, upper, first, lowest, highest, free, barred, CHUNK, BLOCK_N
            )
        for i in range(whole):
            if HAS_SEGMENTS:
                block = chunk * CHUNK + first_bit(whole_bits)
                whole_bits &= whole_bits - 1
            else:
                block = begin + i
            peak, total, acc = _step(
                q, peak, total, acc, key, value, key_row, value_row, batch, kv_head, segments, block, position, words,
                first, keys, width, scale, False, HAS_SEGMENTS, DESCRIBED, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
        for i in range(partial):
            if HAS_SEGMENTS:
                block = chunk * CHUNK + first_bit(partial_bits)
                partial_bits &= partial_bits - 1
            else:
                block = tl.where(i < begin - lower, lower + i, end + i - (begin - lower))
            peak, total, acc = _step(
                q, peak, total, acc, key, value, key_row, value_row, batch, kv_head, segments, block, position, words,
                first, keys, width, scale, True, HAS_SEGMENTS, DESCRIBED, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip

    blind = total == 0  # a row that sees no key
    safe = tl.where(blind, 1.0, total)
    at = ((split * batches + wide) * rows + row) * heads + head
    acc = (acc * (1 / safe)[:, None]).to(output.dtype.element_ty)
    tl.store(output + at[:, None] * width + d[None, :], acc, mask=inside)
    if WITH_LSE:
        at = ((split * batches + wide) * heads + head) * rows + row
        tl.store(lse + at, tl.where(blind, float("-inf"), (peak + tl.log2(safe)) * LN2), mask=real)


@triton.jit(do_not_specialize=LENGTHS)
def combine(
    parts,
    part_lse,
    output,
    lse,
    heads,
    rows,
    width,
    splits,
    WITH_LSE: tl.constexpr,  # noqa: N803
    MAX_SPLITS: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
):
    """Grid (B * R * H). Outputs [splits, B, R, H, D] of several splits, weighted by their log-sum-exp
    [splits, B, H, R], make the output [B, R, H, D] and the log-sum-exp [B, H, R]; all but the output float32."""
    at = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    batch, row, head = at // (rows * heads), at // heads % rows, at % heads
    d = tl.arange(0, BLOCK_D)
    part_lse += (batch * heads + head) * rows + row
    every = tl.arange(0, MAX_SPLITS)
    logs = tl.load(part_lse + every * count, mask=every < splits, other=float("-inf"))
    peak = tl.max(logs, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((logs - safe) * LOG2E), 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for base in range(0, splits, SPLIT_TILE):
        s = base + tl.arange(0, SPLIT_TILE)
        inside = (s < splits)[:, None] & (d < width)[None, :]
        part = tl.load(parts + (s[:, None] * count + at) * width + d[None, :], mask=inside, other=0.0)
        log = tl.load(part_lse + s * count, mask=s < splits, other=float("-inf"))
        acc += tl.sum(tl.exp2((log - safe) * LOG2E)[:, None] * part, 0)
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    tl.store(output + at * width + d, (acc / total).to(output.dtype.element_ty), mask=d < width)
    if WITH_LSE:
        lse_at = (batch * heads + head) * rows + row
        tl.store(lse + lse_at, tl.where(blind, float("-inf"), safe + tl.log2(total) * LN2))
