"""The compiled rope_kv_write against its reference, and against paged_attention, whose caches it writes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.errors import InternalError
from llmc.kernels.build import build_kernels, dlopen_order
from llmc.kernels.isa import runnable_levels
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention
from llmc.kernels.rope_kv_write import C_SHIM, SCHEMA, reference
from llmc.kernels.rope_kv_write.compiled import CompiledRopeKVWrite, RopeKVWriteArgs
from llmc.passes import TOLERANCES

from .paged_attention_world import kernel_cache

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


@dataclass(frozen=True, kw_only=True)
class Step:
    """The op's arguments, caches aside. q, k, v are slices of one tensor, as behind a merged linear."""

    tokens: int = 37
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rotated: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    table_dtype: torch.dtype = torch.float32
    norm: tuple[float, bool] | None = (0.0, True)  # offset, round_first
    norm_dtype: torch.dtype = torch.float32

    def numbers(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @property
    def blocks(self) -> int:
        return 2 + 2 * self.tokens // self.block_size

    def inputs(self) -> tuple[Any, ...]:
        """(q, k, v, positions, cos, sin, weights, eps, offset, round_first) and (slots, group); every fifth token has no slot."""
        qkv = (3 * self.numbers(self.tokens, self.heads + 2 * self.kv_heads, self.dim, seed=0)).to(self.dtype)
        angles = torch.arange(100)[:, None] * 10.0 ** -(torch.arange(self.rotated) / self.rotated)
        tables = [angles.cos().to(self.table_dtype), angles.sin().to(self.table_dtype)]
        weights = [self.numbers(self.dim, seed=s).to(self.norm_dtype) if self.norm else None for s in (1, 2)]
        offset, round_first = self.norm or (0.0, False)
        positions = torch.randperm(100, generator=torch.Generator().manual_seed(3))[: self.tokens]
        slots = torch.randperm(self.blocks * self.block_size, generator=torch.Generator().manual_seed(4))[: self.tokens]
        slots[::5] = -1
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return (q, k, v, positions, *tables, *weights, 1e-6, offset, round_first), slots

    def caches(self) -> list[Tensor]:
        dtype = self.kv_dtype or self.dtype
        width = self.dim + (4 if dtype == torch.int8 else 0)
        return [torch.zeros(self.blocks, self.kv_heads, self.block_size, width, dtype=dtype) for _ in range(2)]


def run(op: Any, step: Step, rows: slice = slice(None), caches: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The op on some of a step's tokens, with group 1 of two groups; group 0 holds what must not be read."""
    (q, k, v, positions, *rest), slots = step.inputs()
    caches = step.caches() if caches is None else caches
    groups = torch.stack([torch.full_like(slots[rows], 1 << 50), slots[rows]])
    return op(q[rows], k[rows], v[rows], positions[rows], *rest, *caches, groups, 1), caches


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


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor | None]:
    """The op the way generated code calls it, with handles of real tensors; None where the shim reports failure."""
    built = build_kernels(runnable_levels()[0].name, kernel_cache(tmp_path_factory))
    order = dlopen_order(built, Path(torch.__file__).parent / "lib")
    function = [ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL) for path in order][-1].aoti_torch_cpu_llmc_rope_kv_write
    pointer_of, capsule_of = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    pointer_of.argtypes, pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    capsule_of.argtypes, capsule_of.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object

    def call(*given: Any) -> Tensor | None:
        capsules = iter(torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([one for one in given if isinstance(one, Tensor)]))
        held, arguments = [], []
        for place, one in enumerate(given):
            if not isinstance(one, Tensor):
                kinds = {float: ctypes.c_double, bool: ctypes.c_int32, int: ctypes.c_int64}
                arguments.append(None if one is None else kinds[type(one)](one))
                continue
            held.append(next(capsules))
            handle = ctypes.c_void_p(pointer_of(held[-1], None))
            arguments.append(ctypes.byref(handle) if place in (6, 7) else handle)  # the weights are optional
        result = ctypes.c_void_p()
        status = function(*arguments, ctypes.byref(result))
        for capsule in held:
            torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)  # frees the handle
        return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule_of(result, None, None)) if status == 0 else None

    return call


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.uint8])
@pytest.mark.parametrize("norm", [None, (1.0, False)])
def test_the_shim_agrees_with_the_reference(shim: Callable[..., Tensor | None], kv_dtype: Any, norm: Any) -> None:
    step = Step(dtype=torch.bfloat16, kv_dtype=kv_dtype, norm=norm, rotated=32)
    found, caches = run(shim, step)
    expected, _ = run(reference, step)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[step.dtype].rtol, atol=TOLERANCES[step.dtype].atol)
    assert all(torch.count_nonzero(cache) > 0 for cache in caches)


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, lambda q: q.double(), "of one of float32"),
        (1, lambda k: k.half(), "of one of float32"),
        (1, lambda k: k[:-1], "disagree in shape"),
        (2, lambda v: v.transpose(1, 2).contiguous().transpose(1, 2), "rows are not dense"),
        (3, lambda positions: positions.int(), "positions must be"),
        (3, lambda positions: positions + 1000, "a position lies past"),
        (4, lambda cos: cos[:, :10], "of one shape and dtype"),
        (5, lambda sin: sin.half(), "of one shape and dtype"),
        (6, lambda weight: weight[1:], "weight must be"),
        (7, lambda weight: weight.double(), "weight must be"),
        (11, lambda cache: cache[:, :1], "do not fit"),
        (12, lambda cache: cache.half(), "of one floating dtype"),
        (13, lambda slots: slots[:, 1:], "slot_mapping must be"),
        (13, lambda slots: slots + 1000, "a slot past"),
        (14, lambda group: group + 1, "no such KV group"),
    ],
)
def test_the_shim_refuses_with_one_sentence(
    shim: Callable[..., Tensor | None], place: int, change: Callable[[Any], Any], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Step()
    inputs, slots = step.inputs()
    caches = step.caches()
    given = [*inputs, *caches, slots[None], 0]
    given[place] = change(given[place])
    assert shim(*given) is None
    message = capfd.readouterr().err
    assert message.startswith("llmc: rope_kv_write: ") and says in message
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


def test_declaration_follows_the_schema() -> None:
    """Generated code passes the op's arguments in the schema's order; a C declaration in another order would still compile."""
    in_schema = [argument.name for argument in torch._C.parse_schema(f"llmc::{SCHEMA}").arguments]
    declared = [part.split()[-1] for part in C_SHIM.partition("(")[2].rstrip(")").split(",")]
    assert C_SHIM.startswith("AOTITorchError aoti_torch_cpu_llmc_rope_kv_write(")
    assert declared == [*in_schema, "ret"]
