"""llmc::paged_attention and llmc::paged_attend in Triton, for decode, prefill and steps that mix them.

A sequence's keys are cut into segments of fixed length, counted from position 0, and these into tiles. A query's result is made tile
by tile inside a segment and segment by segment, in this order only, by the same instructions wherever it is computed:
- decode (one query): every segment has a program of its own (`segments_kernel`), a second kernel merges them (`merge_kernel`);
- prefill (`prefill_kernel`): one program walks all segments of a tile of queries.
Tiles and segments that a query does not see change none of its bits, so a row is the same alone, in a batch, decoded or prefilled.
The segment's length depends on the width of the block table alone; all sizes of an artifact must share that width.

Rows of a tile are (query, head) pairs of one kv head, heads fastest. Letters as in `reference.py`, and R rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..registry import Implementation
from .triton_kernels import merge_kernel, prefill_kernel, segments_kernel, write_kernel

MIN_SEGMENT = 256  # keys
MAX_SEGMENTS = 32  # programs per query and kv head, and rows of scratch
MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """How tiles are cut for a head_dim and dtype: the same for decode and prefill in all that touches a row's bits."""

    tile: int  # keys
    rows: int  # of a decode program; 64 are the rows of one warpgroup's matrix instruction, whether they are filled or not
    prefill_rows: int
    # The layout of a tile's rows over threads fixes the order in which a row's weights are summed: four warps to 64 rows, or eight
    # in both kernels where the two accumulators of a wide head would not fit into the registers.
    warps: int
    prefill_warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What of a launch changes no bit: how far loads run ahead, and the height of a prefill program with as many warps to a row."""

    decode_stages: int
    prefill_rows: int
    prefill_warps: int
    prefill_stages: int


def work_for(head_dim: int, heads_per_kv: int, dtype: torch.dtype, cache: torch.dtype, device: Device = H200) -> Work:
    """How attention is launched where nothing was measured."""
    shape = _shape(head_dim, heads_per_kv, dtype, device)
    stages = 2 if cache == torch.uint8 else shape.stages  # a third leaves too few registers to widen fp8 in
    return Work(decode_stages=stages, prefill_rows=shape.prefill_rows, prefill_warps=shape.prefill_warps, prefill_stages=stages)


def _shape(head_dim: int, heads_per_kv: int, dtype: torch.dtype, device: Device) -> _Shape:
    if dtype == torch.float32:  # no matrix instruction; for checks against other programs, not for speed. Two stages spill (24 bytes)
        return _Shape(tile=32, rows=16, prefill_rows=16, warps=4, prefill_warps=4, stages=1)
    if device.shared_bytes < H200.shared_bytes:
        # Before Hopper a matrix instruction's operands are in registers: larger tiles than these spill (96 bytes a thread).
        rows = 64 if head_dim <= 128 or heads_per_kv > 32 else 32
        return _Shape(tile=32, rows=rows, prefill_rows=rows, warps=8, prefill_warps=8, stages=3)
    if head_dim <= 128:
        return _Shape(tile=64, rows=64, prefill_rows=128, warps=4, prefill_warps=8, stages=3)
    return _Shape(tile=32, rows=64, prefill_rows=64, warps=8, prefill_warps=8, stages=3)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, layer: int, group: int, scale: float, window: int, softcap: float, sinks: Tensor | None, *,
    decode: bool = False, work: Work | None = None, launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`paged_attention_reference` on a GPU. decode: every sequence has at most one query, so prefill need not be looked for.

    work: another than `work_for`'s.
    """
    out = q.new_empty(q.shape)
    launch(_write(k, v, k_cache, v_cache, slot_mapping, query_start_loc, group, out, seq_lens.shape[0]))
    numbers = (group, scale, window, softcap, sinks, decode)
    _attend(out, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, *numbers, work, launch, device)
    return out


def paged_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor, layer: int, group: int,
    scale: float, window: int, softcap: float, sinks: Tensor | None, *,
    decode: bool = False, work: Work | None = None, launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`paged_attend_reference` on a GPU: paged_attention of which the keys and values have been written already."""
    out = q.new_empty(q.shape)
    launch(_write(q, q, k_cache, v_cache, query_start_loc, query_start_loc, group, out, seq_lens.shape[0], kv=False))
    numbers = (group, scale, window, softcap, sinks, decode)
    _attend(out, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, *numbers, work, launch, device)
    return out


def segment_length(max_keys: int) -> int:
    """Keys per segment for sequences of up to `max_keys`."""
    return max(MIN_SEGMENT, next_power_of_2(cdiv(max_keys, MAX_SEGMENTS)))


def _write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, query_start_loc: Tensor, group: int, out: Tensor,
    num_sequences: int, *, kv: bool = True,
) -> Launch:  # fmt: skip
    """Keys and values into the cache (unless `kv` is off), zeros into the rows of no sequence."""
    head_dim, kv_heads = out.shape[2], k.shape[1]
    return Launch(
        kernel=write_kernel,
        grid=(out.shape[0], 3 if kv else 1, 1),
        args={
            "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping, "query_start_loc": query_start_loc,
            "out": out, "group_offset": group * slot_mapping.stride(0) if kv else 0, "num_sequences": num_sequences,
            "k_token": k.stride(0), "k_head": k.stride(1), "v_token": v.stride(0), "v_head": v.stride(1),
            **_cache_strides(k_cache, v_cache), "kv_heads": kv_heads, "row_size": out.shape[1] * head_dim,
        },
        constants={
            "BLOCK_SIZE": k_cache.shape[2], "D": head_dim, "BLOCK_D": max(16, next_power_of_2(head_dim)),
            "BLOCK_J": next_power_of_2(kv_heads), "BLOCK_ROW": 1024,
        },
        num_warps=4,
    )  # fmt: skip


def _attend(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor, group: int,
    scale: float, window: int, softcap: float, sinks: Tensor | None, decode: bool, work: Work | None, launch: Launcher, device: Device,
) -> None:  # fmt: skip
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    num_sequences, heads_per_kv = seq_lens.shape[0], num_heads // kv_heads
    max_keys = block_tables.shape[2] * block_size
    segment = segment_length(max_keys)
    num_segments = cdiv(max_keys, segment)
    block_d = max(16, next_power_of_2(head_dim))
    shape = _shape(head_dim, heads_per_kv, q.dtype, device)
    work = work or work_for(head_dim, heads_per_kv, q.dtype, k_cache.dtype, device)
    common: dict[str, Any] = {
        "query_start_loc": query_start_loc, "seq_lens": seq_lens, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables,
        "table_offset": group * block_tables.stride(0), "table_stride": block_tables.stride(1),
        "q_token": q.stride(0), "q_head": q.stride(1), **_cache_strides(k_cache, v_cache),
        "scale": float(scale), "softcap": float(softcap), "window": window,
    }  # fmt: skip
    constants = {
        "HAS_WINDOW": window > 0, "HAS_SOFTCAP": softcap > 0, "HEADS_PER_KV": heads_per_kv, "BLOCK_SIZE": block_size, "D": head_dim,
        "BLOCK_D": block_d, "SEGMENT": segment, "TILE": shape.tile,
    }  # fmt: skip
    sink_logits = sinks if sinks is not None else seq_lens
    partial = q.new_empty((num_sequences, num_heads, num_segments, head_dim), dtype=torch.float32)
    peaks = q.new_empty((2, num_sequences, num_heads, num_segments), dtype=torch.float32)
    launch(
        Launch(
            kernel=segments_kernel,
            grid=(num_sequences, kv_heads, num_segments),
            args={"q": q, "partial": partial, "peaks": peaks, "totals_offset": peaks.stride(0), **common},
            constants={**constants, "ROWS": shape.rows},
            num_warps=shape.warps,
            num_stages=work.decode_stages,
        )
    )
    launch(
        Launch(
            kernel=merge_kernel,
            grid=(num_sequences, num_heads, 1),
            args={
                "partial": partial, "peaks": peaks, "totals_offset": peaks.stride(0), "sinks": sink_logits, "out": out,
                "query_start_loc": query_start_loc, "seq_lens": seq_lens, "num_segments": num_segments, "num_heads": num_heads,
                "window": window,
            },
            constants={
                "HAS_SINKS": sinks is not None, "HAS_WINDOW": window > 0, "D": head_dim, "BLOCK_D": block_d, "SEGMENT": segment,
                "AT_ONCE": min(8, num_segments),
            },
            num_warps=1 if block_d <= 128 else 2,
        )
    )  # fmt: skip
    if decode or not num_sequences:
        return
    queries = work.prefill_rows // heads_per_kv
    launch(
        Launch(
            kernel=prefill_kernel,
            grid=((cdiv(num_tokens, queries) + num_sequences) if num_tokens else 0, kv_heads, 1),
            args={"q": q, "sinks": sink_logits, "out": out, "num_sequences": num_sequences, "num_heads": num_heads, **common},
            constants={**constants, "ROWS": work.prefill_rows, "QUERIES": queries, "HAS_SINKS": sinks is not None},
            num_warps=work.prefill_warps,
            num_stages=work.prefill_stages,
        )
    )


def _cache_strides(k_cache: Tensor, v_cache: Tensor) -> dict[str, int]:
    names = ("block", "kv_head", "slot")
    return {f"{c}_{n}": t.stride(i) for c, t in (("kc", k_cache), ("vc", v_cache)) for i, n in enumerate(names)}


def paged_attend_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor, layer: int, group: int,
    scale: float, window: int, softcap: float, sinks: Tensor | None,
) -> str | None:  # fmt: skip
    """Why these kernels do not take the arguments, or None."""
    heads, dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    if not 0 < dim <= MAX_HEAD_DIM:
        return f"head_dim {dim}; it takes up to {MAX_HEAD_DIM}"
    most = _shape(dim, heads // max(kv_heads, 1), q.dtype, H200).rows
    if kv_heads == 0 or heads % kv_heads or heads // kv_heads > most:
        return f"{heads} heads on {kv_heads} kv heads; it takes multiples of up to {most}"
    if block_size & (block_size - 1):
        return f"block_size {block_size} is not a power of two"
    if block_tables.shape[2] == 0:
        return "a block table without columns"
    if any(t.stride(-1) != 1 for t in (q, k_cache, v_cache, block_tables)):
        return "q, the caches and the block tables must be contiguous along their last dimension"
    if any(t.dtype != torch.int32 for t in (block_tables, seq_lens, query_start_loc)):
        return "block_tables, seq_lens and query_start_loc must be int32"
    if sinks is not None and (sinks.dtype not in FLOATS or sinks.stride(0) != 1):
        return f"sinks must be contiguous and floating, they are {sinks.dtype}"
    if k_cache.dtype == v_cache.dtype == torch.uint8:  # fp8 e4m3
        return dtype_reason(FLOATS, q=q)
    return dtype_reason(FLOATS, q=q, k_cache=k_cache, v_cache=v_cache)


def paged_attention_reason(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, block_tables: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, layer: int, group: int, scale: float, window: int, softcap: float, sinks: Tensor | None,
) -> str | None:  # fmt: skip
    """Why these kernels do not take the arguments, or None."""
    if k.stride(-1) != 1 or v.stride(-1) != 1 or slot_mapping.stride(-1) != 1 or slot_mapping.dtype != torch.int64:
        return "k, v and slot_mapping must be contiguous along their last dimension, slot_mapping int64"
    return dtype_reason(FLOATS, q=q, k=k, v=v) or paged_attend_reason(
        q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, layer, group, scale, window, softcap, sinks
    )


IMPLEMENTATIONS = (
    Implementation(op="paged_attention", name="triton", supports=paged_attention_reason, call=paged_attention),
    Implementation(op="paged_attend", name="triton", supports=paged_attend_reason, call=paged_attend),
)
