"""The Triton kernels of the attention mass: `plan_rows` lists the row blocks that count for a key block, `mass` sums
over them. One program owns a block of keys: nothing is added atomically, the sum is the same each time."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attend import LENGTHS, LOG2E, dot, sees


@triton.jit(do_not_specialize=LENGTHS)
def plan_rows(
    weight,
    segments,
    table,
    start,
    blocks,
    counts,
    segment_stride,
    rows,
    keys,
    slots,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    """Grid (key blocks, B). Writes the row blocks with a row of weight [B, R] other than 0 that sees a key of the
    block, as far as segments, padding and the block's first key tell: int32 [B, key blocks, slots], ascending; and
    how many, int32 [B, key blocks]."""
    key_block, batch = tl.program_id(0), tl.program_id(1)
    index = (batch * tl.num_programs(0) + key_block).to(tl.int64)
    blocks += index * slots
    weight += batch.to(tl.int64) * rows
    base = key_block * BLOCK_N
    n = base + tl.arange(0, BLOCK_N)
    first = tl.load(start + batch) if HAS_START else 0
    inside = (n < keys) & (n >= first)
    ids = tl.zeros([BLOCK_N], tl.int32)
    if HAS_SEGMENTS:
        segments += batch.to(tl.int64) * segment_stride
        ids = tl.load(segments + n, mask=inside, other=0).to(tl.int32)
    present = tl.reduce_or(tl.where(inside, 1 << ids, 0), 0)
    count = 0
    above = tl.maximum(base - (keys - rows), 0) // BLOCK_M  # row blocks that end before these keys
    for low in range(above, (rows + BLOCK_M - 1) // BLOCK_M, CHUNK):
        block = low + tl.arange(0, CHUNK)
        row = block[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        position = keys - rows + row
        share = tl.load(weight + row, mask=row < rows, other=0.0)
        chosen = (share != 0) & (position >= base) & (position >= first)
        words = tl.zeros([CHUNK, BLOCK_M], tl.int32)
        if HAS_SEGMENTS:
            words = tl.load(table + tl.load(segments + position, mask=chosen, other=0).to(tl.int32))
        free = tl.reduce_or(tl.where(chosen, ~words, 0), 1)
        is_open = ((free & present) != 0).to(tl.int32)
        tl.store(blocks + count + tl.cumsum(is_open, 0) - 1, block, mask=is_open != 0)
        count += tl.sum(is_open, 0)
    tl.store(counts + index, count)


@triton.jit(do_not_specialize=LENGTHS)
def mass(
    query,
    key,
    lse,
    weight,
    output,
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
    segment_stride,
    heads,
    per_kv,
    rows,
    keys,
    width,
    slots,
    HAS_SEGMENTS: tl.constexpr,  # noqa: N803
    HAS_START: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Grid (B * H, key blocks): output [B, H, N] = sum over rows of weight [B, R] times alpha, made again from the
    scores and the rows' log-sum-exp [B, H, R]; all float32. `scale` includes log2 e; `blocks` and `counts` come
    from `plan_rows`."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    index = batch * tl.num_programs(1) + tl.program_id(1)
    base = tl.program_id(1) * BLOCK_N
    offset = tl.arange(0, BLOCK_N)
    n = base + offset
    d = tl.arange(0, BLOCK_D)
    first = tl.load(start + batch) if HAS_START else 0
    blocks += index * slots
    count = tl.load(counts + index)
    key += batch * key_batch + (head // per_kv).to(tl.int64) * key_head + base.to(tl.int64) * key_row
    query += batch * query_batch + head.to(tl.int64) * query_head
    lse += (batch * heads + head) * rows
    weight += batch * rows
    ids = offset
    if HAS_SEGMENTS:
        segments += batch * segment_stride
        ids = tl.load(segments + n, mask=n < keys, other=0).to(tl.int32)
    read = n < tl.where(count > 0, keys, 0)  # a block that nobody sees stays unread
    key_at = key + offset[:, None] * key_row + d[None, :]
    k = tl.load(key_at, mask=read[:, None] & (d < width)[None, :], other=0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in range(count):
        low = tl.load(blocks + i) * BLOCK_M
        m = tl.arange(0, BLOCK_M)
        row = low + m
        position = keys - rows + row
        query_at = query + low.to(tl.int64) * query_row + m[:, None] * query_row + d[None, :]
        q = tl.load(query_at, mask=(row < rows)[:, None] & (d < width)[None, :], other=0.0)
        share = tl.load(weight + row, mask=row < rows, other=0.0)
        chosen = share != 0
        logs = tl.load(lse + row, mask=chosen, other=0.0) * LOG2E
        words = row
        if HAS_SEGMENTS:
            words = tl.load(table + tl.load(segments + position, mask=chosen, other=0).to(tl.int32))
        scores = dot(q, tl.trans(k), None, PRECISION) * scale
        seen = sees(position, words, first, n, ids, HAS_SEGMENTS) & chosen[:, None]
        total += tl.sum(tl.where(seen, tl.exp2(scores - logs[:, None]), 0.0) * share[:, None], 0)
    tl.store(output + (batch * heads + head) * keys + n, total, mask=n < keys)
