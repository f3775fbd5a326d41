"""rope_kv_write's AOTInductor shim: called the way generated code calls it, with handles of real tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.kernels.build import build_kernels, dlopen_order
from llmc.kernels.isa import runnable_levels
from llmc.kernels.rope_kv_write import C_SHIM, SCHEMA, reference
from llmc.passes import TOLERANCES

from .paged_attention_world import kernel_cache
from .rope_kv_write_step import Step, run


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
