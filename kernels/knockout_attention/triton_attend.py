"""The Triton kernels of the attention itself.

`attend` goes through the key blocks that its rows see, with an online softmax. `combine` merges the results of several
programs for one row block. Each program finds out itself which blocks the segments and the padding leave open
(`survey`), because a list in memory would cost a launch, and a wait for the address of every block. Every program pays
for the instructions before its first product, which are fetched only once. So they are few, with divisions only for
splits, packed rows and grouped heads.

A program has the rows m = 0 .. packed * R, with query head m // R and position N - R + m % R. A prefill packs one head.
A decoding step packs all heads that share a key head, which fills the 16 rows of the tensor cores and reads each key
once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dispatch import interpreted
from . import SEGMENTS

INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SPLIT_TILE = tl.constexpr(16)
ENTRIES = tl.constexpr(SEGMENTS)  # entries of a table

# lengths change from call to call and must not make Triton compile a kernel again
LENGTHS = ["rows", "keys", "before", "segment_stride", "splits"]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # noqa: N803
    """Compute a @ b + acc (if not None) in float32; `PRECISION` selects how float32 operands are multiplied."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def before_and_real(position, key, first):
    """Return which keys causality and padding let each row see, bool [rows, keys]."""
    return (key[None, :] <= position[:, None]) & (key >= first)[None, :]


@triton.jit
def unblocked(words, ids):
    """Return which keys the segments let each row see, bool [rows, keys]; `words` are the table entries of the rows."""
    return ((words[:, None] >> ids[None, :]) & 1) == 0


@triton.jit
def first_bit(bits):
    """Return the place of the lowest set bit of a nonzero int32, which is the exponent of that power of two."""
    power = (bits & (0 - bits)).to(tl.float32)
    return ((power.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def count_bits(bits):
    """Return the number of set bits of an int32, from sums of two, four and then eight bits side by side."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24) & 255


@triton.jit
def soft_capped(scores, cap):
    """Compute cap * tanh(scores / cap), near 0 by a polynomial, as 1 - 2 / (e^2u + 1) would lose the digits there."""
    u = scores / cap
    square = u * u
    near = 0.02059098519384861 - 0.005659984890371561 * square  # minimax for tanh(u) / u up to 0.625, 4e-9 relative
    near = near * square - 0.05372106656432152
    near = near * square + 0.13331127166748047
    near = near * square - 0.3333325982093811
    near = near * square * u + u
    size = tl.abs(u)
    far = 1.0 - 2.0 / (tl.exp2(tl.where(size > 10.0, 10.0, size) * 2.8853900817779268) + 1.0)  # NaN stays NaN
    return cap * tl.where(size < 0.625, near, tl.where(u < 0.0, -far, far))


@triton.jit
def survey(
    segments,
    base,
    first,
    last,
    free,
    barred,
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
):
    """Find the open and the barred key blocks among base .. base + CHUNK, for the keys first .. last.

    Args:
        free: Bits of the segments that at least one of the rows sees.
        barred: Bits of the segments that at least one of the rows does not see.

    Returns:
        Two int32 with a bit for each block: the blocks with a key in a free segment, and those with a key in a barred
        segment.
    """
    at = tl.arange(0, CHUNK * BLOCK_N)
    key = base * BLOCK_N + at
    inside = (key >= first) & (key <= last)
    segment = 1 << tl.load(segments + key, mask=inside, other=0).to(tl.int32)
    bit = tl.where(inside, 1 << (at // BLOCK_N), 0)
    is_open = tl.where((segment & free) != 0, bit, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
    is_barred = tl.where((segment & barred) != 0, bit, 0).to(tl.uint32, bitcast=True).to(tl.uint64)
    both = tl.reduce_or(is_open | (is_barred << 32), 0)  # one reduction, because each makes the program wait 3 times
    return both.to(tl.uint32).to(tl.int32, bitcast=True), (both >> 32).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _step(  # long: one kernel, whose parts share registers
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
    barred,
    position,
    lowest,
    words,
    first,
    keys,
    width,
    scale,
    softcap,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    DESCRIBED: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Add one block of keys to the running maximum [BLOCK_M] (base 2), sum [BLOCK_M] and output [BLOCK_M, BLOCK_D].

    Blocks with and without a mask go through one loop. Between two loops the copies under way would have to end.
    """
    n = tl.arange(0, BLOCK_N)
    base = block * BLOCK_N
    if DESCRIBED:  # zeros beyond the last key and the width
        k = tl.reshape(key.load([batch, kv_head, base, 0]), [BLOCK_N, BLOCK_D])
        v = tl.reshape(value.load([batch, kv_head, base, 0]), [BLOCK_N, BLOCK_D])
    else:
        d = tl.arange(0, BLOCK_D)
        row = tl.minimum(base + n, keys - 1).to(tl.int64)  # repeats the last key beyond the end, where no row sees it
        key_at = key + (row * key_stride)[:, None] + d[None, :]
        value_at = value + (row * value_stride)[:, None] + d[None, :]
        if EVEN_D:
            k = tl.load(key_at)
            v = tl.load(value_at)
        else:
            k = tl.load(key_at, mask=(d < width)[None, :], other=0.0)
            v = tl.load(value_at, mask=(d < width)[None, :], other=0.0)
    scores = dot(q, tl.trans(k), None, PRECISION)
    if HAS_SOFTCAP:
        scores = soft_capped(scores * scale, softcap)
        scale = 1.0
    if (base + BLOCK_N - 1 > lowest) | (base < first):  # blocks on the diagonal or at the end of the padding
        scores = tl.where(before_and_real(position, base + n, first), scores, float("-inf"))
    if HAS_SEGMENTS and barred:
        ids = tl.load(segments + base + n, mask=base + n < keys, other=0).to(tl.int32)
        scores = tl.where(unblocked(words, ids), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    alpha = tl.exp2(scores * scale - safe[:, None])  # one fused multiply-add, as the scale is positive
    fade = tl.exp2(peak - safe)
    total = total * fade + tl.sum(alpha, 1)
    acc = dot(alpha.to(v.dtype), v, acc * fade[:, None], PRECISION)
    return new_peak, total, acc


@triton.jit(do_not_specialize=LENGTHS)
def attend(  # long: one kernel, whose parts share registers
    query,
    key,
    value,
    output,
    lse,
    segments,
    table,
    start,
    sinks,
    scale,
    softcap,
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
    splits,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    HAS_SINKS: tl.constexpr,  # noqa: N803
    WITH_LSE: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    GROUPED: tl.constexpr,  # noqa: N803
    DESCRIBED: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Compute the attention of a block of rows, over the key blocks of one split.

    The grid is (H / packed, row blocks * splits, B). Each split takes an even share of the key blocks and writes its
    own normalised output [splits, B, R, H, D] and log-sum-exp [splits, B, H, R]. With one split these are the result.
    `sinks` is float32 [H], which `combine` counts where there are splits. `scale` and `softcap` include log2 e. If
    DESCRIBED, `key` and `value` are descriptors of [B, Hkv, N, D] with blocks of [1, 1, BLOCK_N, BLOCK_D], which the
    chip's copy engine reads without the help of the threads. Else they are addresses.
    """
    group, place, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batches, split, row_blocks = tl.num_programs(2), 0, tl.num_programs(1)
    if SPLIT:
        place, split, row_blocks = place // splits, place % splits, row_blocks // splits
    row_block = row_blocks - 1 - place  # the rows with the most keys start first

    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = m < packed * rows
    if PACKED:  # all rows of each head
        head, row, kv_head = group * packed + m // rows, m % rows, group
        lowest, highest = tl.minimum(before, keys - 1), keys - 1
    else:
        head, row, kv_head = group + m * 0, m, group
        if GROUPED:
            kv_head = group // per_kv
        lowest = tl.minimum(before + row_block * BLOCK_M, keys - 1)
        highest = tl.minimum(before + row_block * BLOCK_M + BLOCK_M, keys) - 1
    position = tl.minimum(before + row, keys - 1)  # rows after all keys see as much as the last position
    first = tl.load(start + batch) if HAS_START else 0
    wide = batch.to(tl.int64)

    # this split's share of the key blocks from the padding to the last row
    lower, upper = first // BLOCK_N, (highest + BLOCK_N) // BLOCK_N
    if SPLIT:
        blocks = tl.maximum(upper - lower, 0)
        lower, upper = lower + blocks * split // splits, lower + blocks * (split + 1) // splits
    words = position
    if HAS_SEGMENTS:
        segments += wide * segment_stride
        own = tl.load(segments + position).to(tl.int32)
        entries = tl.load(table + tl.arange(0, ENTRIES))  # all, as loading those of the rows would wait for segments
    query += wide * query_batch + head.to(tl.int64)[:, None] * query_head + row.to(tl.int64)[:, None] * query_row
    inside = real[:, None] if EVEN_D else real[:, None] & (d < width)[None, :]
    q = tl.load(query + d[None, :], mask=inside, other=0.0)
    if not DESCRIBED:
        key += wide * key_batch + kv_head.to(tl.int64) * key_head
        value += wide * value_batch + kv_head.to(tl.int64) * value_head
    if HAS_SEGMENTS:
        # padding sees nothing and must not open a block
        live = tl.reduce_or(tl.where(position >= first, 1 << own, 0), 0)
        is_live = ((live >> tl.arange(0, ENTRIES)) & 1) != 0
        free = tl.reduce_or(tl.where(is_live, ~entries, 0), 0)  # segments that some row sees
        barred = tl.reduce_or(tl.where(is_live, entries, 0), 0)  # segments that some row does not see
        words = tl.load(table + own)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SEGMENTS:
        last = tl.minimum(highest, upper * BLOCK_N - 1)
        for base in range(lower, upper, CHUNK):
            open_bits, barred_bits = survey(segments, base, first, last, free, barred, CHUNK, BLOCK_N)
            for _ in range(count_bits(open_bits)):
                bit = first_bit(open_bits)
                open_bits &= open_bits - 1
                peak, total, acc = _step(
                    q, peak, total, acc, key, value, key_row, value_row, batch, kv_head, segments, base + bit,
                    ((barred_bits >> bit) & 1) != 0, position, lowest, words, first, keys, width, scale, softcap,
                    True, HAS_SOFTCAP, DESCRIBED, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
                )  # fmt: skip
    else:
        for block in range(lower, upper):
            peak, total, acc = _step(
                q, peak, total, acc, key, value, key_row, value_row, batch, kv_head, segments, block,
                False, position, lowest, words, first, keys, width, scale, softcap,
                False, HAS_SOFTCAP, DESCRIBED, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip

    if HAS_SINKS and not SPLIT:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(peak, sink)
        fade = tl.exp2(peak - top)
        total = total * fade + tl.exp2(sink - top)
        acc *= fade[:, None]
        peak = top
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
    sinks,
    heads,
    rows,
    width,
    splits,
    HAS_SINKS: tl.constexpr,  # noqa: N803
    WITH_LSE: tl.constexpr,  # noqa: N803
    MAX_SPLITS: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
):
    """Merge the results of several splits into the output [B, R, H, D] and the log-sum-exp [B, H, R].

    The grid is (B * R * H). The outputs [splits, B, R, H, D] of the splits are weighted by their log-sum-exp
    [splits, B, H, R], and the sinks [H] are added to the sums. Everything except the merged output is float32.
    """
    at = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    batch, row, head = at // (rows * heads), at // heads % rows, at % heads
    d = tl.arange(0, BLOCK_D)
    part_lse += (batch * heads + head) * rows + row
    every = tl.arange(0, MAX_SPLITS)
    logs = tl.load(part_lse + every * count, mask=every < splits, other=float("-inf"))
    peak = tl.max(logs, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head)
        peak = tl.maximum(peak, sink)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((logs - safe) * LOG2E), 0)
    if HAS_SINKS:
        total += tl.exp2((sink - safe) * LOG2E)
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
