"""The compiled rope_kv_write against its reference, and against paged_attention, whose caches it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.errors import InternalError
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention
from llmc.kernels.rope_kv_write import reference
from llmc.kernels.rope_kv_write.compiled import CompiledRopeKVWrite, RopeKVWriteArgs
from llmc.passes import TOLERANCES

from .paged_attention_world import kernel_cache
from .rope_kv_write_step import Step, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = ("x86-64-v3", "x86-64-v4")  # where the kernel's code differs, and the best one, where rounding and attention do


@dataclass(frozen=True)
class Built:
    rope: CompiledRopeKVWrite
    attention: CompiledPagedAttention


@pytest.fixture(
    scope="module", params=sorted({level.name for level in runnable_levels() if level.name in LEVELS} | {runnable_levels()[-1].name})
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    kernels_so = build_kernels(request.param, kernel_cache(tmp_path_factory)).kernels_so
    return Built(CompiledRopeKVWrite(kernels_so, num_threads=2), CompiledPagedAttention(kernels_so, num_threads=1))


def by_attention(built: Built, step: Step, k: Tensor, v: Tensor) -> list[Tensor]:
    """Caches that paged_attention itself writes, from keys that are rotated already."""
    _, slots = step.inputs()
    caches = step.caches()
    nothing = torch.zeros(1, 0, 1, dtype=torch.int32)
    q = torch.zeros(step.tokens, step.heads, step.dim, dtype=step.dtype)
    ends = torch.zeros(1, dtype=torch.int32)
    built.attention(q, k, v, *caches, slots[None], nothing, ends[:0], ends, 0, 0, 1.0, 0, 0.0, None)
    return caches


def rotated_keys(op: Any, step: Step) -> Tensor:
    """What the op makes of k, as the result of its q."""
    (_, k, v, positions, cos, sin, _, k_weight, *rest), slots = step.inputs()
    out: Tensor = op(k, k, v, positions, cos, sin, k_weight, k_weight, *rest, *step.caches(), slots[None], 0)
    return out


def check(built: Built, step: Step) -> None:
    """Rotated q and k within the table's tolerance of the reference; the cache as paged_attention writes these very keys, to the bit."""
    found, caches = run(built.rope, step)
    expected, _ = run(reference, step)
    within = TOLERANCES[step.dtype]
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=within.rtol, atol=within.atol)
    keys = rotated_keys(built.rope, step)
    torch.testing.assert_close(keys, rotated_keys(reference, step), rtol=within.rtol, atol=within.atol)
    (_, _, v, *_), _ = step.inputs()
    for have, want in zip(caches, by_attention(built, step, keys, v), strict=True):
        assert torch.equal(have, want)
        assert torch.count_nonzero(have) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, (0.0, True), (1.0, False), (0.0, False)])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.uint8])
def test_agrees_with_the_reference(built: Built, dtype: torch.dtype, norm: tuple[float, bool] | None, kv_dtype: torch.dtype | None) -> None:
    check(built, Step(dtype=dtype, norm=norm, kv_dtype=kv_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, rotated", [(64, 16), (64, 34), (80, 32), (72, 72), (40, 10), (8, 2), (256, 256)])
def test_widths(built: Built, dtype: torch.dtype, dim: int, rotated: int) -> None:
    """Heads that are no multiple of a vector, and rotations of a head's first dimensions."""
    for norm in (None, (0.0, True)):
        check(built, Step(dtype=dtype, dim=dim, rotated=rotated, norm=norm, table_dtype=dtype, norm_dtype=dtype, block_size=8))


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("norm_dtype", DTYPES)
def test_tables_and_weights_of_another_type(built: Built, table_dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
    check(built, Step(dtype=torch.bfloat16, table_dtype=table_dtype, norm_dtype=norm_dtype, heads=6, kv_heads=6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_a_token_has_the_same_bits_alone(built: Built, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    step = Step(dtype=dtype, kv_dtype=kv_dtype, tokens=100, heads=8)
    together, caches = run(built.rope, step)
    alone = step.caches()
    for t in range(step.tokens):
        out, _ = run(built.rope, step, slice(t, t + 1), alone)
        assert torch.equal(out[0], together[t])
    assert all(torch.equal(a, b) for a, b in zip(alone, caches, strict=True))


def test_nothing_to_do(built: Built) -> None:
    out, caches = run(built.rope, replace(Step(), tokens=37), slice(0, 0))
    assert out.shape == (0, 4, 64)
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


def test_extreme_values(built: Built) -> None:
    """Infinities and NaN stay where they are met: in their own head."""
    step = Step(norm=None, dtype=torch.bfloat16)
    (q, k, v, *rest), slots = step.inputs()
    q[3, 1, 5], q[4, 2, 40] = float("nan"), float("inf")
    out = built.rope(q, k, v, *rest, *step.caches(), slots[None], 0)
    bad = ~out.isfinite().all(-1)
    assert bad.nonzero().tolist() == [[3, 1], [4, 2]]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("struct_bytes", 8, "another size"),
        ("dtype", 3, "must share one of"),
        ("kv_dtype", 2, "must share one of"),
        ("table_dtype", 9, "must share one of"),
        ("k_weight_dtype", -1, "must share one of"),
        ("head_dim", 60, "multiples of 8"),
        ("head_dim", 1 << 20, "multiples of 8"),
        ("block_size", 4, "multiples of 8"),
        ("rotated", 63, "multiples of 8"),
        ("rotated", 66, "multiples of 8"),
        ("rotated", 0, "multiples of 8"),
        ("num_tokens", -1, "multiples of 8"),
        ("cos", None, "multiples of 8"),
        ("k_cache", None, "multiples of 8"),
        ("num_positions", 3, "a position lies past the tables"),
        ("num_blocks", 1, "a slot past the last block"),
    ],
)
def test_refuses_with_one_sentence(built: Built, field: str, value: int | None, says: str) -> None:
    step = Step()
    inputs, slots = step.inputs()
    caches = step.caches()
    args: RopeKVWriteArgs = built.rope.arguments(*inputs, *caches, slots[None], 0)
    setattr(args, field, value)
    with pytest.raises(InternalError, match=says):
        built.rope.run(args)
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


def test_negative_positions_are_refused(built: Built) -> None:
    step = Step()
    (q, k, v, positions, *rest), slots = step.inputs()
    positions[7] = -1
    with pytest.raises(InternalError, match="a position lies past"):
        built.rope(q, k, v, positions, *rest, *step.caches(), slots[None], 0)
