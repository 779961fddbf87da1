"""The Triton kernel of the attention mass.

One program owns a block of keys and goes through the row blocks that count for it. Nothing is added atomically, so the
sum is the same every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attend import LENGTHS, LOG2E, before_and_real, count_bits, dot, first_bit, soft_capped, unblocked


@triton.jit
def survey_rows(
    chosen,
    segments,
    table,
    base,
    key,
    last,
    first,
    present,
    rows,
    keys,
    HAS_CHOSEN: tl.constexpr,  # noqa: N803
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
):
    """Find the row blocks among base .. base + CHUNK that count for the keys `key` .. `last`.

    `present` has a bit for each segment of these keys.

    Returns:
        Two int32 with a bit for each block. The first marks the blocks in which all rows are chosen and see all of the
        keys. The second marks the other blocks that have a chosen row which may see a key, judged by the segments, the
        padding and the first key.
    """
    index = tl.arange(0, CHUNK)
    row = (base + index)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    position = keys - rows + row
    counts = row < rows
    if HAS_CHOSEN:
        counts = tl.load(chosen + row, mask=counts, other=0) != 0
    seeing = counts & (position >= key) & (position >= first)
    words = tl.zeros([CHUNK, BLOCK_M], tl.int32)
    if HAS_SEGMENTS:
        words = tl.load(table + tl.load(segments + position, mask=seeing, other=0).to(tl.int32))
    free = tl.reduce_or(tl.where(seeing, ~words, 0), 1)
    is_open = (free & present) != 0
    all_see = counts & (position >= last) & ((words & present) == 0)
    whole = is_open & (tl.min(all_see.to(tl.int32), 1) != 0) & (key >= first) & (last < keys)
    bit = 1 << index
    return tl.reduce_or(tl.where(whole, bit, 0), 0), tl.reduce_or(tl.where(is_open & ~whole, bit, 0), 0)


@triton.jit
def _rows(query, query_row, row, rows, width, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):  # noqa: N803
    """Load the queries of a block of rows."""
    d = tl.arange(0, BLOCK_D)
    at = query + row.to(tl.int64)[:, None] * query_row + d[None, :]
    if MASKED:
        return tl.load(at, mask=(row < rows)[:, None] & (d < width)[None, :], other=0.0)
    elif EVEN_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def mass(  # long: one kernel, whose parts share registers
    query,
    key,
    lse,
    chosen,
    counted,
    output,
    segments,
    table,
    start,
    scale,
    softcap,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    segment_stride,
    heads,
    per_kv,
    rows,
    keys,
    width,
    HAS_CHOSEN: tl.constexpr,  # noqa: N803
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    EVEN_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Compute the mean of alpha over the chosen rows, or over all rows, as `output` [B, H, N].

    The grid is (B * H, key blocks). alpha is computed again from the scores and the log-sum-exp [B, H, R] of the rows,
    in float32. `chosen` is uint8 [B, R], and `counted`, float32 [B], is the number of chosen rows. `scale` and
    `softcap` include log2 e.
    """
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    base = tl.program_id(1) * BLOCK_N
    offset = tl.arange(0, BLOCK_N)
    n = base + offset
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    first = tl.load(start + batch) if HAS_START else 0
    key += batch * key_batch + (head // per_kv).to(tl.int64) * key_head + base.to(tl.int64) * key_row
    query += batch * query_batch + head.to(tl.int64) * query_head
    lse += (batch * heads + head) * rows
    if HAS_CHOSEN:
        chosen += batch * rows
    inside = (n < keys) & (n >= first)
    ids = tl.zeros([BLOCK_N], tl.int32)
    if HAS_SEGMENTS:
        segments += batch * segment_stride
        ids = tl.load(segments + n, mask=inside, other=0).to(tl.int32)
    present = tl.reduce_or(tl.where(inside, 1 << ids, 0), 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over the rows once at the end, not once per block
    above = tl.maximum(base - (keys - rows), 0) // BLOCK_M  # row blocks that end before these keys
    for low in range(above, (rows + BLOCK_M - 1) // BLOCK_M, CHUNK):
        whole_bits, partial_bits = survey_rows(
            chosen, segments, table, low, base, base + BLOCK_N - 1, first, present, rows, keys,
            HAS_CHOSEN, HAS_SEGMENTS, CHUNK, BLOCK_M,
        )  # fmt: skip
        read = n < tl.where((whole_bits | partial_bits) != 0, keys, 0)  # a block that no row sees is not read
        key_at = key + offset[:, None] * key_row + d[None, :]
        k = tl.load(key_at, mask=read[:, None] & (d < width)[None, :], other=0.0)
        for _ in range(count_bits(whole_bits)):
            row = (low + first_bit(whole_bits)) * BLOCK_M + m
            whole_bits &= whole_bits - 1
            q = _rows(query, query_row, row, rows, width, False, BLOCK_D, EVEN_D)
            logs = tl.load(lse + row) * LOG2E
            scores = dot(q, tl.trans(k), None, PRECISION) * scale
            if HAS_SOFTCAP:
                scores = soft_capped(scores, softcap)
            total += tl.exp2(scores - logs[:, None])
        for _ in range(count_bits(partial_bits)):
            row = (low + first_bit(partial_bits)) * BLOCK_M + m
            partial_bits &= partial_bits - 1
            position = keys - rows + row
            q = _rows(query, query_row, row, rows, width, True, BLOCK_D, EVEN_D)
            counts = row < rows
            if HAS_CHOSEN:
                counts = tl.load(chosen + row, mask=counts, other=0) != 0
            logs = tl.load(lse + row, mask=counts, other=0.0) * LOG2E
            words = row
            if HAS_SEGMENTS:
                words = tl.load(table + tl.load(segments + position, mask=counts, other=0).to(tl.int32))
            scores = dot(q, tl.trans(k), None, PRECISION) * scale
            if HAS_SOFTCAP:
                scores = soft_capped(scores, softcap)
            alpha = tl.exp2(scores - logs[:, None])
            seen = before_and_real(position, n, first) & counts[:, None]
            if HAS_SEGMENTS:
                seen = seen & unblocked(words, ids)
            total += tl.where(seen, alpha, 0.0)
    count = tl.maximum(tl.load(counted + batch), 1.0) if HAS_CHOSEN else tl.maximum(rows, 1).to(tl.float32)
    tl.store(output + (batch * heads + head) * keys + n, tl.sum(total, 0) / count, mask=n < keys)
