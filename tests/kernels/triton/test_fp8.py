"""fp8 in Triton kernels: every code and many numbers against torch; caches of fp8 in rope_kv_write and paged attention."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmc.kernels.fp8 import from_fp8, to_fp8
from llmc.kernels.paged_attention import paged_attention_reference
from llmc.kernels.paged_attention.triton_impl import paged_attend_reason, paged_attention
from llmc.kernels.rope_kv_write import rope_kv_write_reference
from llmc.kernels.rope_kv_write.triton_impl import rope_kv_write, rope_kv_write_reason
from tests.kernels.paged_attention_world import Shape, World

from .test_paged_attention import on_device
from .test_rope_kv_write import arguments
from .test_rope_kv_write import on_device as args_on_device
from .world import DEVICE, assert_close, poisoned, same_bits


@triton.jit
def both_ways(bits, numbers, decoded, encoded, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(decoded + i, from_fp8(tl.load(bits + i, mask=i < count, other=0)), mask=i < count)
    tl.store(encoded + i, to_fp8(tl.load(numbers + i, mask=i < count, other=0.0)), mask=i < count)


def test_every_code_and_many_numbers() -> None:
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    finite = exact[~exact.isnan()]
    middle = (finite.sort().values[1:] + finite.sort().values[:-1]) / 2  # ties go to the even code
    numbers = torch.cat([finite, middle, torch.randn(3000) * 3, torch.randn(500) * 300, torch.randn(500) * 0.005])
    numbers = torch.cat([numbers, torch.tensor([float("inf"), -float("inf"), float("nan"), 448.1, 1e30, -0.0, 1e-9])])
    count = len(numbers)
    bits = codes.repeat(-(-count // 256))[:count]
    decoded, encoded = torch.empty(count, device=DEVICE), torch.empty(count, dtype=torch.uint8, device=DEVICE)
    both_ways[(triton.cdiv(count, 512), 1, 1)](bits.to(DEVICE), numbers.to(DEVICE), decoded, encoded, count, BLOCK=512)
    theirs = bits.view(torch.float8_e4m3fn).float()
    assert torch.equal(decoded.cpu(), torch.where(theirs.isnan(), 480.0 * (1 - 2 * (bits >> 7).float()), theirs))
    clipped = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(encoded.cpu(), clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rope_writes_fp8(dtype: torch.dtype) -> None:
    for change in ({}, {"dim": 40, "rotated": 10, "norm": False}):
        args = arguments(dtype=dtype, **change)  # type: ignore[arg-type]
        args[11] = torch.zeros(args[11].shape, dtype=torch.uint8)
        args[12] = args[11].clone()
        assert rope_kv_write_reason(*args) is None
        ours, theirs = args_on_device(args), [a.clone() if isinstance(a, Tensor) else a for a in args]
        with poisoned():
            found = rope_kv_write(*ours)
        assert_close(found, rope_kv_write_reference(*theirs))
        assert torch.equal(ours[12].cpu(), theirs[12])  # v goes in as it is
        # k is computed: where it lies at a tie of fp8's coarse steps, its last bit in `dtype` may decide between two neighbours
        steps = (ours[11].cpu().int() - theirs[11].int()).abs()
        assert int(steps.max()) <= 1 and int((steps > 0).sum()) <= steps.numel() // 500 + 1
        assert int((theirs[11] > 0).sum()) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_fp8(dtype: torch.dtype) -> None:
    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype)
    world = World(shape, 1)
    theirs = [torch.zeros(c.shape, dtype=torch.uint8) for c in world.caches()]
    ours = [c.clone().to(DEVICE) for c in theirs]
    for step in ({"a": 70, "b": 3}, {"a": 1, "b": 1}, {"a": 1, "b": 9}):
        batch = world.batch(step, 1)
        decode = all(n == 1 for n in step.values())
        with poisoned():
            found = on_device(batch).call(lambda *a, d=decode: paged_attention(*a, decode=d), ours)
        assert_close(found, batch.call(paged_attention_reference, theirs))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


def test_a_row_over_fp8_has_the_same_bits_decoded_and_prefilled() -> None:
    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)

    def last_row(steps: list[dict[str, int]], *, decode: bool) -> Tensor:
        world = World(shape, 3)
        caches = [torch.zeros(c.shape, dtype=torch.uint8, device=DEVICE) for c in world.caches()]
        for step in steps:
            batch = world.batch(step)
            last = step is steps[-1]
            out = on_device(batch).call(lambda *a, d=decode and last: paged_attention(*a, decode=d), caches)
        return out[batch.rows["a"].stop - 1]

    alone = last_row([{"a": 60}, {"a": 1}], decode=True)
    assert same_bits(alone, last_row([{"a": 60, "b": 5}, {"b": 3, "a": 1}], decode=False))
    assert same_bits(alone, last_row([{"a": 40}, {"a": 21, "b": 2}], decode=False))


def test_other_bytes_are_refused() -> None:
    q, cache = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16, 16, dtype=torch.int8)
    ints = torch.zeros(2, dtype=torch.int32)
    tables = torch.zeros(1, 1, 1, dtype=torch.int32)
    assert "one dtype" in str(paged_attend_reason(q, cache, cache, tables, ints[:1], ints, 0, 0, 1.0, 0, 0.0, None))
    mixed = paged_attend_reason(q, cache.view(torch.uint8), q[None], tables, ints[:1], ints, 0, 0, 1.0, 0, 0.0, None)
    assert "one dtype" in str(mixed) or "contiguous" in str(mixed)
