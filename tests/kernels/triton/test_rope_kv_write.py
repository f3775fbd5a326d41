"""rope_kv_write in Triton against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.kernels.rope_kv_write import rope_kv_write_reference
from llmc.kernels.rope_kv_write.triton_impl import rope_kv_write, rope_kv_write_reason

from .world import DEVICE, assert_close, poisoned, same_bits


def arguments(
    *, tokens: int = 5, heads: int = 4, kv_heads: int = 2, dim: int = 32, rotated: int = 0, dtype: torch.dtype = torch.float32,
    norm: bool = True, offset: float = 0.0, round_first: bool = True, padding: int = 1,
) -> list[Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    rotated = rotated or dim
    angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(0, rotated, 2) / rotated)
    angles = torch.cat([angles, angles], 1)
    weights = [(torch.rand(dim, generator=generator) + 0.5).to(dtype) if norm else None for _ in range(2)]
    cache = torch.zeros(4, kv_heads, 16, dim, dtype=dtype)
    slots = torch.randperm(64, generator=generator)[:tokens]
    slots[tokens - padding :] = -1
    positions = torch.randint(0, 64, (tokens,), generator=generator)
    mapping = torch.stack([torch.full_like(slots, 1 << 50), slots])
    return [
        q,
        k,
        v,
        positions,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        *weights,
        1e-6,
        offset,
        round_first,
        cache,
        cache.clone(),
        mapping,
        1,
    ]


def on_device(args: list[Any]) -> list[Any]:
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": False},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16, "offset": 1.0, "round_first": False},
    {"dtype": torch.bfloat16, "heads": 7, "kv_heads": 1, "dim": 80},
    {"dim": 40, "rotated": 10, "kv_heads": 3, "heads": 6},
    {"dim": 96, "rotated": 48, "norm": False, "heads": 5, "kv_heads": 5},
    {"tokens": 1, "padding": 0},
    {"tokens": 0, "padding": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parity(variant: dict[str, Any]) -> None:
    args = arguments(**variant)
    assert rope_kv_write_reason(*args) is None
    ours, theirs = on_device(args), [a.clone() if isinstance(a, Tensor) else a for a in args]
    with poisoned():
        found = rope_kv_write(*ours)
    assert_close(found, rope_kv_write_reference(*theirs))
    assert_close(ours[11], theirs[11])
    assert same_bits(ours[12].cpu(), theirs[12])
    assert torch.equal(ours[11].cpu() == 0, theirs[11] == 0)  # nothing written elsewhere


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    args = arguments(tokens=9, padding=0, dtype=torch.bfloat16)
    whole = rope_kv_write(*on_device(args))
    for rows in (slice(0, 1), slice(8, 9), slice(2, 7)):
        part = [a[rows] for a in args[:4]] + args[4:13] + [args[13][:, rows].contiguous(), 1]
        assert same_bits(rope_kv_write(*on_device(part)), whole[rows])


def test_what_is_refused() -> None:
    args = arguments()
    assert "int64" in str(rope_kv_write_reason(*args[:3], args[3].int(), *args[4:]))
    assert "one dtype" in str(rope_kv_write_reason(args[0].half(), *args[1:]))
    assert "last dimension" in str(rope_kv_write_reason(args[0].transpose(1, 2), *args[1:]))
