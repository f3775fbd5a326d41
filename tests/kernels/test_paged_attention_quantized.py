"""paged_attention over caches of eight bits: parity with the reference, one row's bits, what NaN does, the formats themselves."""

from __future__ import annotations

import pytest
import torch

from llmc.errors import InternalError
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention
from llmc.kernels.paged_attention.reference import dequantize_kv, quantize_kv

from .paged_attention_world import Shape, World, kernel_fixture
from .test_paged_attention import PROMPTS, assert_parity

kernel = kernel_fixture()

KINDS = pytest.mark.parametrize("kind", [torch.int8, torch.uint8], ids=["int8", "fp8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@KINDS
@DTYPES
@pytest.mark.parametrize(("head_dim", "block_size"), [(8, 8), (24, 16), (64, 16), (72, 24), (128, 32), (264, 16)])
def test_shapes(kernel: CompiledPagedAttention, head_dim: int, block_size: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    assert_parity(kernel, Shape(head_dim=head_dim, block_size=block_size, dtype=dtype, kv_dtype=kind), PROMPTS, padding=2)


@KINDS
def test_windows_softcap_and_sinks(kernel: CompiledPagedAttention, kind: torch.dtype) -> None:
    shape = Shape(window=30, softcap=20.0, sinks_dtype=torch.float32, kv_dtype=kind, num_heads=12, merged_qkv=True)
    assert_parity(kernel, shape, [{"a": 290, "b": 40}, {"a": 1, "b": 1}, {"a": 90}, {"a": 1}])


@KINDS
def test_a_row_has_the_same_bits_alone_chunked_and_with_others(kernel: CompiledPagedAttention, kind: torch.dtype) -> None:
    shape = Shape(kv_dtype=kind)
    together, alone = World(shape, 3), World(shape, 3, block_seed=9)
    caches, other = together.caches(), alone.caches()
    batch = together.batch({"a": 300, "b": 41})
    whole = batch.call(kernel, caches)[batch.rows["a"]]
    pieces = [alone.batch({"a": count}).call(kernel, other) for count in (1, 130, 168, 1)]
    assert torch.equal(torch.cat(pieces), whole)


@KINDS
def test_a_key_that_is_not_finite_is_not_hidden(kernel: CompiledPagedAttention, kind: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        world = World(Shape(kv_dtype=kind), 0)
        batch, caches = world.batch({"a": 75}), world.caches()
        batch.v[61, :, 5] = bad
        out = batch.call(kernel, caches)
        assert out[:61].isfinite().all()
        seen = out[61:, :, 5].float()
        if kind == torch.uint8 and bad == float("inf"):
            assert seen.isfinite().all() and seen.abs().max() > 1  # held to 448, as the format is defined here
        else:
            assert seen.isnan().all()


def test_a_cache_of_another_float_type_is_refused(kernel: CompiledPagedAttention) -> None:
    world = World(Shape(kv_dtype=torch.float16), 0)
    with pytest.raises(InternalError, match="int8 or fp8"):
        world.batch({"a": 5}).call(kernel, world.caches())


def test_int8_is_within_half_a_step() -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 4, 50)[:, None, None]
    x[7] = 0
    stored = quantize_kv(x, torch.int8)
    assert stored.shape == (50, 3, 68)
    back = dequantize_kv(stored)
    assert ((back - x).abs() <= x.abs().amax(dim=-1, keepdim=True) / 127 * 0.5001).all()
    assert torch.equal(back[7], x[7])


def test_every_fp8_value_survives_and_the_kernel_writes_what_torch_does(kernel: CompiledPagedAttention) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = dequantize_kv(codes)
    finite = values.isfinite()
    assert finite.sum() == 254 and values[finite].abs().max() == 448
    assert torch.equal(quantize_kv(values[finite], torch.uint8), codes[finite])
    halfway = (values[:126] + values[1:127]) / 2  # ties, and their neighbours on both sides
    x = torch.cat([halfway, halfway.nextafter(torch.tensor(9e9)), -halfway.nextafter(torch.tensor(0.0)), torch.tensor([1e9, -1e-9, 449.0])])
    x = torch.cat([x, torch.zeros(-len(x) % 64)]).reshape(-1, 1, 64)
    world = World(Shape(dtype=torch.float32, kv_dtype=torch.uint8, num_heads=1, num_kv_heads=1), 0)
    batch, caches = world.batch({"a": len(x)}), world.caches()
    batch.v.copy_(x)
    batch.call(kernel, caches)
    written = caches[1].flatten(1, 2).reshape(-1, 64)[batch.slot_mapping]
    assert torch.equal(dequantize_kv(written), dequantize_kv(quantize_kv(x[:, 0], torch.uint8)))
