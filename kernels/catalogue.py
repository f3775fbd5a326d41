"""The launches of every GPU kernel at typical sizes, over fake tensors: what a cross compile check builds and a report can list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .launch import H200, Device, Launch
from .moe.reference import most_tiles
from .registry import choose

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def launches_of(op: str, *args: Any, device: Device = H200) -> list[Launch]:
    """The launches, in order, that the chosen implementation of `op` makes for these (fake) arguments."""
    found: list[Launch] = []
    choose(op, *args).call(*args, launch=found.append, device=device)
    return found


def catalogue(device: Device = H200, *, tma: bool = True) -> dict[str, list[Launch]]:
    """Case name -> launches for a GPU; tma: it has the tensor memory accelerator."""
    with FakeTensorMode():
        found = {name: launches_of(op, *args, device=device) for name, (op, args) in _cases(torch.empty).items()}
        return {**found, **({**_loaded_by_tma(device), **_other_attention(device)} if tma else {})}


def _loaded_by_tma(device: Device) -> dict[str, list[Launch]]:
    """Products as a table of measured tiles may want them."""
    from .plain_linear.triton_impl import plain_linear, tile_for

    found: dict[str, list[Launch]] = {}
    for tokens in (256, 2048):
        tile = replace(tile_for(tokens, BF16), tma=True)
        launches = found[f"plain_linear bfloat16 tma {tokens}"] = []
        x, weight, bias = (torch.empty(*sizes, dtype=BF16) for sizes in ((tokens, 4096), (6144, 4096), (6144,)))
        plain_linear(x, weight, bias, launch=launches.append, device=device, tile=tile)
    return found


def _other_attention(device: Device) -> dict[str, list[Launch]]:
    """Attention whose prefill programs are half as high, as a table of measured ways may want it."""
    from .paged_attention.triton_impl import paged_attend, work_for

    work = replace(work_for(128, 4, BF16, BF16, device), prefill_rows=64, prefill_warps=4, prefill_stages=1, decode_stages=2)
    q, cache = torch.empty(64, 32, 128, dtype=BF16), torch.empty(1000, 8, 16, 128, dtype=BF16)
    tables, lengths, starts = (torch.empty(*sizes, dtype=torch.int32) for sizes in ((1, 8, 256), (8,), (9,)))
    launches: list[Launch] = []
    paged_attend(q, cache, cache, tables, lengths, starts, 0, 0, 0.1, 0, 0.0, None, work=work, launch=launches.append, device=device)
    return {"paged_attention tuned": launches}


def _cases(empty: Callable[..., Tensor]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    def t(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
        return empty(*sizes, dtype=dtype)

    gate, up = t(8, 2 * 14336).split(14336, dim=1)
    cases: dict[str, tuple[str, tuple[Any, ...]]] = {
        "rms_norm": ("rms_norm", (t(8, 4096), t(4096), 1e-6, 0.0, True)),
        "rms_norm widest": ("rms_norm", (t(8, 16384), t(16384), 1e-6, 1.0, False)),
        "rms_norm fp32": ("rms_norm", (t(8, 1024, dtype=F32), t(1024, dtype=F32), 1e-6, 0.0, True)),
        "add_rms_norm": ("add_rms_norm", (t(8, 4096), t(8, 4096), t(4096), 1e-6, 0.0, True)),
        "silu_mul": ("silu_mul", (gate, up)),
        "gelu_mul": ("gelu_mul", (gate, up, True)),
        "gelu_mul exact": ("gelu_mul", (gate, up, False)),
    }
    for name, heads, kv_heads, dim, dtype, window, softcap, sinks in [
        ("llama-8b", 32, 8, 128, BF16, 0, 0.0, False),
        ("qwen-0.6b", 16, 8, 128, F16, 0, 0.0, False),
        ("gemma", 8, 4, 256, BF16, 1024, 50.0, False),
        ("gpt-oss", 64, 8, 64, BF16, 128, 0.0, True),
        ("phi", 32, 32, 80, BF16, 0, 0.0, False),
        ("fp32", 4, 2, 64, F32, 0, 0.0, False),
    ]:
        q, k, v = t(64, heads + 2 * kv_heads, dim, dtype=dtype).split([heads, kv_heads, kv_heads], dim=1)
        cache, ints = t(1000, kv_heads, 16, dim, dtype=dtype), t(8, dtype=torch.int32)
        tables, starts = t(1, 8, 256, dtype=torch.int32), t(9, dtype=torch.int32)
        rest = (tables, ints, starts, 0, 0, dim**-0.5, window, softcap, t(heads, dtype=dtype) if sinks else None)
        cases[f"paged_attention {name}"] = ("paged_attention", (q, k, v, cache, cache, t(1, 64, dtype=torch.int64), *rest))
        if name in ("llama-8b", "gemma"):  # a cache of fp8
            cache = t(1000, kv_heads, 16, dim, dtype=torch.uint8)
            cases[f"paged_attention {name} fp8"] = ("paged_attention", (q, k, v, cache, cache, t(1, 64, dtype=torch.int64), *rest))
        tables = t(4096, dim, dtype=F32)
        weight = t(dim, dtype=dtype) if name in ("qwen-0.6b", "gemma") else None
        write = (cache, cache, t(1, 64, dtype=torch.int64), 0)
        cases[f"rope_kv_write {name}"] = (
            "rope_kv_write",
            (q, k, v, t(64, dtype=torch.int64), tables, tables, weight, weight, 1e-6, 0.0, True, *write),
        )
    for dtype in (BF16, F32):
        for tokens in (1, 32, 64, 256, 2048):
            weight, bias = t(6144, 4096, dtype=dtype), t(6144, dtype=dtype)
            cases[f"plain_linear {str(dtype)[6:]} {tokens}"] = ("plain_linear", (t(tokens, 4096, dtype=dtype), weight, bias))
    cases["plain_linear one part 2048"] = ("plain_linear", (t(2048, 4096), t(28672, 4096), None))
    cases["plain_linear uneven 2048"] = ("plain_linear", (t(2048, 2872), t(201, 2896)[:, :2872], None))
    for kind, bits in ((torch.int8, 8), (torch.uint8, 4), (torch.float8_e4m3fn, 8)):
        for tokens in (1, 64, 256, 2048):
            weight, scales = t(6144, 4096 * bits // 8, dtype=kind), t(6144, 32)
            name = f"plain_quantized_linear {str(kind)[6:]} {tokens}"
            cases[name] = ("plain_quantized_linear", (t(tokens, 4096), weight, scales, None, 128))
    cases["moe_route qwen3"] = ("moe_route", (t(64, 128), 8, True, True, False))
    cases["moe_route gpt-oss"] = ("moe_route", (t(64, 32), 4, False, False, False))
    for tokens, tile in ((1, 16), (64, 16), (1024, 64), (8192, 128)):
        num_rows, num_tiles = tokens * 8, most_tiles(tokens * 8, 128, tile)
        cases[f"moe_sort {tokens}"] = ("moe_sort", (t(tokens, 8, dtype=torch.int64), 128, tile))
        order = (t(num_tiles * tile, dtype=torch.int32), t(num_tiles, dtype=torch.int32))
        cases[f"moe_linear {tokens}"] = ("moe_linear", (t(tokens, 2048), t(128, 1536, 2048), *order, None, num_rows, 8))
    cases["moe_combine"] = ("moe_combine", (t(512, 2048), t(64, 8)))
    inverse, wide = t(256, dtype=F32), t(256, dtype=torch.float64)
    for truncate in (False, True):
        numbers = (inverse, t(256, dtype=torch.int32), wide, wide, t(256, dtype=torch.int64), t(256, dtype=torch.int64), truncate)
        cases[f"sample{' truncated' if truncate else ''}"] = ("sample", (t(256, 151936), *numbers))
    touched = (t(256, 512, dtype=torch.int32), t(256, 512, dtype=F32), t(256, 512, dtype=F32), t(256, 3, dtype=F32))
    cases["adjust_logits"] = ("adjust_logits", (t(256, 151936), t(256, 4748, dtype=torch.int32), *touched))
    cases["checked_tokens"] = ("checked_tokens", (t(256, 151936), t(256, dtype=torch.int64)))
    cases["token_logprobs"] = ("token_logprobs", (t(256, 151936), t(256, dtype=torch.int64), 20))
    cases["argmax"] = ("argmax", (t(256, 151936),))
    return cases
