"""The Triton kernels of the attention itself: `plan_keys` lists the key blocks that a row block reads, `attend` walks
the list with an online softmax, `combine` puts together what several programs made of one list.

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
LENGTHS = ["rows", "keys", "before", "segment_stride", "slots", "splits"]


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


@triton.jit(do_not_specialize=LENGTHS)
def plan_keys(
    segments,
    table,
    start,
    blocks,
    counts,
    segment_stride,
    packed,
    rows,
    keys,
    slots,
    HAS_START: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    """Grid (row blocks, B). Writes the key blocks with a pair (row, key) that segments and padding leave open, up to
    the last row: int32 [B, row blocks, slots], ascending from the front those that need no mask, from the back those
    that need one; and how many of each, int32 [B, row blocks, 2]."""
    row_block, batch = tl.program_id(0), tl.program_id(1)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = keys - rows + m % rows
    first = tl.load(start + batch) if HAS_START else 0
    segments += batch.to(tl.int64) * segment_stride
    real = m < packed * rows
    live = real & (position >= first)  # padding sees nothing and must not open a block
    words = tl.load(table + tl.load(segments + position, mask=live, other=0).to(tl.int32))
    free = tl.reduce_or(tl.where(live, ~words, 0), 0)  # segments that some row sees
    barred = tl.reduce_or(tl.where(live, words, 0), 0)  # segments that some row does not see
    lowest = tl.min(tl.where(real, position, keys), 0)
    highest = tl.max(tl.where(live, position, -1), 0)

    index = batch * tl.num_programs(0) + row_block
    blocks += index.to(tl.int64) * slots
    whole, partial = 0, 0
    for base in range(first // BLOCK_N, highest // BLOCK_N + 1, CHUNK):
        block = base + tl.arange(0, CHUNK)
        key = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = (key >= first) & (key <= highest)
        ids = tl.load(segments + key, mask=inside, other=0).to(tl.int32)
        present = tl.reduce_or(tl.where(inside, 1 << ids, 0), 1)
        is_open = (present & free) != 0
        edge = (block * BLOCK_N + BLOCK_N - 1 > lowest) | (block * BLOCK_N < first)
        masked = edge | ((present & barred) != 0)
        is_whole = (is_open & ~masked).to(tl.int32)
        is_partial = (is_open & masked).to(tl.int32)
        tl.store(blocks + whole + tl.cumsum(is_whole, 0) - 1, block, mask=is_whole != 0)
        tl.store(blocks + slots - partial - tl.cumsum(is_partial, 0), block, mask=is_partial != 0)
        whole += tl.sum(is_whole, 0)
        partial += tl.sum(is_partial, 0)
    tl.store(counts + 2 * index, whole)
    tl.store(counts + 2 * index + 1, partial)


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
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One block of keys: the running maximum [BLOCK_M] (base 2), sum [BLOCK_M] and output [BLOCK_M, BLOCK_D]."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    base = block * BLOCK_N
    key += base.to(tl.int64) * key_stride
    value += base.to(tl.int64) * value_stride
    key_at = key + n[:, None] * key_stride + d[None, :]
    value_at = value + n[:, None] * value_stride + d[None, :]
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
    scores = dot(q, tl.trans(k), None, PRECISION) * scale
    if MASKED:
        ids = n
        if HAS_SEGMENTS:
            ids = tl.load(segments + base + n, mask=base + n < keys, other=0).to(tl.int32)
        scores = tl.where(sees(position, words, first, base + n, ids, HAS_SEGMENTS), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    alpha = tl.exp2(scores - safe[:, None])
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
    blocks,
    counts,
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
    slots,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    WITH_LSE: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Grid (B * H / packed, row blocks, splits). Each split takes an even share of the open blocks and writes its
    own normalised output [splits, B, R, H, D] and log-sum-exp [splits, B, H, R]; one split's are the result.
    `scale` includes log2 e. `blocks` and `counts` come from `plan_keys`; without segments they are not read."""
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
    batch = batch.to(tl.int64)
    query += batch * query_batch + head.to(tl.int64)[:, None] * query_head + row.to(tl.int64)[:, None] * query_row
    inside = real[:, None] if EVEN_D else real[:, None] & (d < width)[None, :]
    q = tl.load(query + d[None, :], mask=inside, other=0.0)
    kv_head = (group * packed // per_kv).to(tl.int64)
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head

    if HAS_SEGMENTS:
        segments += batch * segment_stride
        words = tl.load(table + tl.load(segments + position, mask=real, other=0).to(tl.int32))
        index = batch * tl.num_programs(1) + row_block
        blocks += index * slots
        whole = tl.load(counts + 2 * index)
        partial = tl.load(counts + 2 * index + 1)
        low, high, leading = 0, 0, 0
    else:
        # from the padding to the diagonal; only at both ends is a mask needed
        words = position
        lowest = tl.min(tl.where(real, position, keys), 0)
        highest = tl.max(tl.where(real, position, -1), 0)
        bottom = first // BLOCK_N
        top = tl.maximum(highest // BLOCK_N + 1, bottom)
        low = tl.minimum((first + BLOCK_N - 1) // BLOCK_N, top)
        high = tl.minimum(tl.maximum((lowest + 1) // BLOCK_N, low), top)
        leading = low - bottom
        whole = high - low
        partial = top - bottom - whole

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lower, upper = (whole + partial) * split // splits, (whole + partial) * (split + 1) // splits
    for i in range(tl.minimum(lower, whole), tl.minimum(upper, whole)):
        block = tl.load(blocks + i) if HAS_SEGMENTS else low + i
        peak, total, acc = _step(
            q, peak, total, acc, key, value, key_row, value_row, segments, block, position, words, first, keys,
            width, scale, False, HAS_SEGMENTS, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
    for i in range(tl.maximum(lower, whole) - whole, tl.maximum(upper, whole) - whole):
        if HAS_SEGMENTS:
            block = tl.load(blocks + slots - 1 - i)
        else:
            block = tl.where(i < leading, low - leading + i, high - leading + i)
        peak, total, acc = _step(
            q, peak, total, acc, key, value, key_row, value_row, segments, block, position, words, first, keys,
            width, scale, True, HAS_SEGMENTS, BLOCK_N, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip

    blind = total == 0  # a row that sees no key
    safe = tl.where(blind, 1.0, total)
    at = ((split * batches + batch) * rows + row) * heads + head
    acc = (acc * (1 / safe)[:, None]).to(output.dtype.element_ty)
    tl.store(output + at[:, None] * width + d[None, :], acc, mask=inside)
    if WITH_LSE:
        at = ((split * batches + batch) * heads + head) * rows + row
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
