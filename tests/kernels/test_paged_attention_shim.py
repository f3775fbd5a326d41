"""paged_attention's AOTInductor shim: called the way generated code calls it, with handles of real tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmc.kernels.build import build_kernels, dlopen_order
from llmc.kernels.isa import runnable_levels
from llmc.kernels.paged_attention import C_SHIM, SCHEMA, attend, reference

from .paged_attention_world import Batch, Shape, World, kernel_cache

_SUCCESS = 0
# torch hands out tensor handles wrapped in capsules.
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes, _pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.argtypes, _capsule_of.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
Shim = Callable[..., Tensor | None]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """The op through its shim, of 15 arguments or as paged_attend of 12; None where the shim reports failure."""
    built = build_kernels(runnable_levels()[0].name, kernel_cache(tmp_path_factory))
    libraries = [
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW) for path in dlopen_order(built, Path(torch.__file__).parent / "lib")
    ]
    functions = {9: libraries[-1].aoti_torch_cpu_llmc_paged_attention, 6: libraries[-1].aoti_torch_cpu_llmc_paged_attend}
    handle, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    for given, function in functions.items():
        function.argtypes = [*[handle] * given, integer, integer, real, integer, real, ctypes.POINTER(handle), ctypes.POINTER(handle)]

    def call(*args: object) -> Tensor | None:
        *tensors, layer, group, scale, window, softcap, sinks = args
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([*tensors, *([] if sinks is None else [sinks])])
        handles = [handle(_pointer_of(capsule, None)) for capsule in capsules]
        result = handle()
        sinks_pointer = None if sinks is None else ctypes.pointer(handles[-1])
        status = functions[len(tensors)](
            *handles[: len(tensors)], layer, group, scale, window, softcap, sinks_pointer, ctypes.byref(result)
        )
        for capsule in capsules:
            torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)  # frees the handle
        return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule_of(result, None, None)) if status == _SUCCESS else None

    return call


@pytest.mark.parametrize("sinks_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("merged", [True, False])
def test_agrees_with_the_reference(shim: Shim, merged: bool, sinks_dtype: torch.dtype | None) -> None:
    world = World(Shape(merged_qkv=merged, sinks_dtype=sinks_dtype, window=40, softcap=30.0), seed=3)
    ours, theirs = world.caches(), world.caches()
    for step in ({"a": 50, "b": 3}, {"a": 1, "b": 1}):
        batch = world.batch(step, padding=1)
        got = batch.call(shim, ours)
        assert got is not None
        torch.testing.assert_close(got, batch.call(reference, theirs), atol=8e-3, rtol=1.6e-2)


def attended(batch: Batch, op: Shim, caches: list[Tensor]) -> Tensor | None:
    """paged_attend of a batch whose keys and values stand in the caches already."""
    return batch.call(lambda q, k, v, *rest: op(q, *rest[:2], *rest[3:]), caches)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.uint8])
def test_attending_without_writing_has_the_same_bits(shim: Shim, kv_dtype: torch.dtype | None) -> None:
    world = World(Shape(merged_qkv=True, sinks_dtype=torch.float32, window=40, kv_dtype=kv_dtype), seed=3)
    caches, empty = world.caches(), world.caches()
    for step in ({"a": 50, "b": 3}, {"a": 1, "b": 1}):
        batch = world.batch(step, padding=1)
        written = batch.call(shim, caches)
        before = [cache.clone() for cache in caches]
        found = attended(batch, shim, caches)
        assert found is not None and torch.equal(found, written)
        assert all(torch.equal(a, b) for a, b in zip(before, caches, strict=True))
    assert attended(batch, shim, empty) is not None
    assert all(torch.count_nonzero(cache) == 0 for cache in empty)


def test_attending_refuses_as_writing_does(shim: Shim, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(Shape(), seed=3)
    batch, caches = world.batch({"a": 5}), world.caches()
    batch.block_tables = torch.full_like(batch.block_tables, 1 << 20)
    assert attended(batch, shim, caches) is None
    assert "block id" in capfd.readouterr().err
    assert attended(batch, shim, [cache[..., :32] for cache in caches]) is None
    assert "do not fit" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: {"q": b.q.to(torch.float64)}, "q is none of"),
        (lambda b: {"k": b.k.float()}, "one dtype"),
        (lambda b: {"q": b.q.transpose(1, 2).contiguous().transpose(1, 2)}, "rows dense"),
        (lambda b: {"v": b.v[:-1]}, "disagree in shape"),
        (lambda b: {"seq_lens": b.seq_lens.long()}, "seq_lens must be"),
        (lambda b: {"query_start_loc": b.query_start_loc[:-1]}, "query_start_loc must be"),
        (lambda b: {"block_tables": b.block_tables.repeat(2, 1)}, "block_tables must be"),
        (lambda b: {"slot_mapping": b.slot_mapping[1:]}, "slot_mapping must be"),
        (lambda b: {"sinks": torch.zeros(3)}, "sinks must be"),
        (lambda b: {"softcap": -2.0}, "must not be negative"),
        (lambda b: {"block_tables": torch.full_like(b.block_tables, 1 << 20)}, "block id"),
    ],
)
def test_refuses_with_one_sentence(
    shim: Shim, change: Callable[..., dict[str, object]], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(Shape(), seed=3)
    batch, caches = world.batch({"a": 5}), world.caches()
    vars(batch).update(change(batch))
    assert batch.call(shim, caches) is None
    message = capfd.readouterr().err
    assert message.startswith("llmc: paged_attention of layer 0: ")
    assert says in message
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


def test_refuses_caches_that_do_not_fit(shim: Shim, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(Shape(), seed=3)
    batch, (k_cache, v_cache) = world.batch({"a": 5}), world.caches()
    wrong = [
        (k_cache, v_cache[:-1]),
        (k_cache[:, :1], v_cache[:, :1]),
        (k_cache.float(), v_cache),
        (k_cache.transpose(2, 3).contiguous().transpose(2, 3), v_cache),
        (k_cache.float(), v_cache.float()),
    ]
    for pair in wrong:
        assert batch.call(shim, list(pair)) is None
        assert "paged_attention of layer 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "schema", "declaration"),
    [("paged_attention", SCHEMA, C_SHIM), ("paged_attend", attend.SCHEMA, attend.C_SHIM)],
)
def test_declaration_follows_the_schema(name: str, schema: str, declaration: str) -> None:
    """Generated code passes the op's arguments in the schema's order; a C declaration in another order would still compile."""
    in_schema = [argument.name for argument in torch._C.parse_schema(f"llmc::{schema}").arguments]
    declared = [part.split()[-1] for part in declaration.partition("(")[2].rstrip(")").split(",")]
    assert declaration.startswith(f"AOTITorchError aoti_torch_cpu_llmc_{name}(")
    assert declared == [*in_schema, "ret"]
