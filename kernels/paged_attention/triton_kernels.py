"""The kernels behind `triton_impl.py`. Weights are powers of two: scores carry a factor log2(e), kept out of every other place."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ..fp8 import cache_value, load_cache

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kernel(
    k, v, k_cache, v_cache, slot_mapping, query_start_loc, out, group_offset, num_sequences,
    k_token, k_head, v_token, v_head, kc_block, kc_kv_head, kc_slot, vc_block, vc_kv_head, vc_slot, kv_heads, row_size,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """Per token: zeros into the result if it belongs to no sequence (part 0), its key (1) and value (2) into their slot."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        if token >= tl.load(query_start_loc + num_sequences):
            for start in range(0, row_size, BLOCK_ROW):
                columns = start + tl.arange(0, BLOCK_ROW)
                tl.store(out + token * row_size + columns, tl.zeros([BLOCK_ROW], out.dtype.element_ty), mask=columns < row_size)
    else:
        slot = tl.load(slot_mapping + group_offset + token)
        if slot >= 0:
            block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            head = tl.arange(0, BLOCK_J)[:, None]
            d = tl.arange(0, BLOCK_D)[None, :]
            inside = (head < kv_heads) & (d < D)
            if part == 1:
                tile = tl.load(k + token * k_token + head * k_head + d, mask=inside)
                tl.store(k_cache + block * kc_block + head * kc_kv_head + place * kc_slot + d, cache_value(tile, k_cache), mask=inside)
            else:
                tile = tl.load(v + token * v_token + head * v_head + d, mask=inside)
                tl.store(v_cache + block * vc_block + head * vc_kv_head + place * vc_slot + d, cache_value(tile, v_cache), mask=inside)


@triton.jit
def _segment(
    q_RD, k_head, v_head, table, position_R, first, last, lowest, kc_block, kc_slot, vc_block, vc_slot, scale, softcap, window,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys [first, last), not divided: (largest score, sum of weights, weighted sum of values) of each row.

    first is a multiple of TILE; blocks that hold only keys below `lowest` may have been given away, and are not read.
    """
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, TILE):
        key = start + tl.arange(0, TILE)
        present = (key >= lowest) & (key < last)
        block = tl.load(table + key // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        place = key % BLOCK_SIZE
        loaded = present[:, None] & (d < D)[None, :]
        k_LD = load_cache(k_head + (block * kc_block + place * kc_slot)[:, None] + d[None, :], loaded, q_RD.dtype)
        score = tl.dot(q_RD, tl.trans(k_LD), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (e^2x + 1), good to a unit in the last place of 1, which is softcap's own
            twice = tl.exp2(score * (tl.cast(scale, tl.float32) / tl.cast(softcap, tl.float32) * (2 * LOG2_E)))
            score = (1.0 - 2.0 / (twice + 1.0)) * (tl.cast(softcap, tl.float32) * LOG2_E)
        else:
            score = score * (tl.cast(scale, tl.float32) * LOG2_E)
        seen = present[None, :] & (key[None, :] <= position_R[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position_R[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet: no infinity minus infinity
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(score - base[:, None])
        v_LD = load_cache(v_head + (block * vc_block + place * vc_slot)[:, None] + d[None, :], loaded, q_RD.dtype)
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        sum_RD = tl.dot(weight.to(v_LD.dtype), v_LD, sum_RD * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, sum_RD


@triton.jit
def _merge(peak, total, sum_RD, next_peak, next_total, next_RD):
    """Two runs of keys into one. The products and additions are spelt out, so that no compiler joins them in two ways."""
    higher = tl.maximum(peak, next_peak)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    left, right = tl.exp2(peak - base), tl.exp2(next_peak - base)
    return higher, tl.fma(next_total, right, total * left), tl.fma(next_RD, right[:, None] + tl.zeros_like(next_RD), sum_RD * left[:, None])


@triton.jit
def _finish(peak, total, sum_RD, sink, HAS_SINKS: tl.constexpr):
    """The weighted sum over the sum of weights, the sink's weight included; zero for rows that saw no key."""
    if HAS_SINKS:
        sink = sink * LOG2_E
        higher = tl.maximum(peak, sink)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - base)
        total = tl.fma(total, shrink, tl.exp2(sink - base))
        sum_RD = sum_RD * shrink[:, None]
    return sum_RD / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def segments_kernel(
    q, partial, peaks, totals_offset,
    query_start_loc, seq_lens, k_cache, v_cache, block_tables, table_offset, table_stride, q_token, q_head,
    kc_block, kc_kv_head, kc_slot, vc_block, vc_kv_head, vc_slot, scale, softcap, window,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HEADS_PER_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (sequence, kv head, segment): one segment of the keys of a sequence that has one query."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    token = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(seq_lens + sequence)
    if tl.load(query_start_loc + sequence + 1) - token == 1:
        first = segment * SEGMENT
        last = tl.minimum(first + SEGMENT, length)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(length - window, 0)
            first = tl.maximum(first, lowest // TILE * TILE)
        if first < last:
            row = tl.arange(0, ROWS)
            d = tl.arange(0, BLOCK_D)
            filled = (row < HEADS_PER_KV)[:, None] & (d < D)[None, :]
            head = kv_head * HEADS_PER_KV + row
            q_RD = tl.load(q + token * q_token + head[:, None] * q_head + d[None, :], mask=filled, other=0.0)
            position = tl.zeros([ROWS], tl.int32) + (length - 1)
            peak, total, sum_RD = _segment(
                q_RD, k_cache + kv_head * kc_kv_head, v_cache + kv_head * vc_kv_head, block_tables + table_offset + sequence * table_stride,
                position, first, last, lowest, kc_block, kc_slot, vc_block, vc_slot, scale, softcap, window,
                HAS_WINDOW, HAS_SOFTCAP, BLOCK_SIZE, D, BLOCK_D, TILE, ROWS,
            )  # fmt: skip
            place = (sequence * tl.num_programs(1) * HEADS_PER_KV + head) * tl.num_programs(2) + segment
            tl.store(partial + place[:, None] * D + d[None, :], sum_RD, mask=filled)
            tl.store(peaks + place, peak, mask=row < HEADS_PER_KV)
            tl.store(peaks + totals_offset + place, total, mask=row < HEADS_PER_KV)


@triton.jit
def merge_kernel(
    partial, peaks, totals_offset, sinks, out, query_start_loc, seq_lens, num_segments, num_heads, window,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid (sequence, head): the segments of a sequence that has one query, in their order."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(seq_lens + sequence)
    if tl.load(query_start_loc + sequence + 1) - token == 1:
        d = tl.arange(0, BLOCK_D)
        peak = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        sum_RD = tl.zeros([1, BLOCK_D], tl.float32)
        place = (sequence * num_heads + head) * num_segments + tl.arange(0, 1)
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(length - window, 0) // SEGMENT
        end = tl.cdiv(length, SEGMENT)
        for start in range(begin, end, AT_ONCE):
            for i in tl.static_range(AT_ONCE):  # their loads are on their way together; a segment past the end changes no bit
                there = start + i < end
                at = place + start + i
                one = there & (tl.arange(0, 1) == 0)
                next_peak = tl.load(peaks + at, mask=one, other=float("-inf"))
                next_total = tl.load(peaks + totals_offset + at, mask=one, other=0.0)
                next_RD = tl.load(partial + at[:, None] * D + d[None, :], mask=one[:, None] & (d < D)[None, :], other=0.0)
                peak, total, sum_RD = _merge(peak, total, sum_RD, next_peak, next_total, next_RD)
        sink = tl.zeros([1], tl.float32)
        if HAS_SINKS:
            sink += tl.load(sinks + head).to(tl.float32)
        y = _finish(peak, total, sum_RD, sink, HAS_SINKS)
        to = out + (token * num_heads + head) * D + d[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit
def prefill_kernel(
    q, sinks, out, num_sequences, num_heads,
    query_start_loc, seq_lens, k_cache, v_cache, block_tables, table_offset, table_stride, q_token, q_head,
    kc_block, kc_kv_head, kc_slot, vc_block, vc_kv_head, vc_slot, scale, softcap, window,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HEADS_PER_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (tile of queries, kv head), for sequences of two and more queries.

    Sequence i owns the tiles from `start_i // QUERIES + i` on, which is enough for each and needs no table; some stay empty.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    low, high = 0, num_sequences  # the last sequence whose first tile is not past this one
    while high - low > 1:
        middle = (low + high) // 2
        past = tl.load(query_start_loc + middle) // QUERIES + middle > tile
        low = tl.where(past, low, middle)
        high = tl.where(past, middle, high)
    begin = tl.load(query_start_loc + low)
    num_queries = tl.load(query_start_loc + low + 1) - begin
    first_query = (tile - begin // QUERIES - low) * QUERIES
    if (num_queries > 1) & (first_query < num_queries):
        length = tl.load(seq_lens + low)
        row = tl.arange(0, ROWS)
        query = first_query + row // HEADS_PER_KV
        head = kv_head * HEADS_PER_KV + row % HEADS_PER_KV
        d = tl.arange(0, BLOCK_D)
        real = (row < QUERIES * HEADS_PER_KV) & (query < num_queries)
        filled = real[:, None] & (d < D)[None, :]
        token = (begin + query).to(tl.int64)
        q_RD = tl.load(q + token[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=filled, other=0.0)
        position = length - num_queries + query
        first_position = length - num_queries + first_query
        end = tl.minimum(first_position + QUERIES, length)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(first_position - window + 1, 0)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sum_RD = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for segment in range(lowest // SEGMENT, tl.cdiv(tl.maximum(end, 0), SEGMENT)):
            first = tl.maximum(segment * SEGMENT, lowest // TILE * TILE)
            last = tl.minimum((segment + 1) * SEGMENT, end)
            next_peak, next_total, next_RD = _segment(
                q_RD, k_cache + kv_head * kc_kv_head, v_cache + kv_head * vc_kv_head,
                block_tables + table_offset + tl.cast(low, tl.int64) * table_stride,
                position, first, last, lowest, kc_block, kc_slot, vc_block, vc_slot, scale, softcap, window,
                HAS_WINDOW, HAS_SOFTCAP, BLOCK_SIZE, D, BLOCK_D, TILE, ROWS,
            )  # fmt: skip
            peak, total, sum_RD = _merge(peak, total, sum_RD, next_peak, next_total, next_RD)
        sink = tl.zeros([ROWS], tl.float32)
        if HAS_SINKS:
            sink += tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
        y = _finish(peak, total, sum_RD, sink, HAS_SINKS)
        to = out + (token[:, None] * num_heads + head[:, None]) * D + d[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=filled)
