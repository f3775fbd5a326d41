"""The tensor runtime: what AOTInductor's code calls of libtorch, without libtorch."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.kernels.aoti_runtime import PROVIDED, SHIM_PREFIX, SONAME, lacking
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import isa_level, runnable_levels
from tests.kernels.paged_attention_world import kernel_cache

_LEVELS = [level.name for level in runnable_levels()]
_FLOAT32, _INT64 = 6, 4
_APPLY = """
#include <immintrin.h>
typedef VECTOR (*function)(VECTOR);
void apply(function f, const float *in, float *out, long count) {
  for (long i = 0; i < count; i += LANES) STORE(out + i, f(LOAD(in + i)));
}
"""
Handle = ctypes.c_void_p


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_kernels(_LEVELS[-1], kernel_cache(tmp_path_factory)).tensor_runtime_so


@pytest.fixture(scope="module")
def runtime(image: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    kernels = build_kernels(_LEVELS[-1], kernel_cache(tmp_path_factory)).kernels_so
    ctypes.CDLL(str(kernels), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    library = ctypes.CDLL(str(image), mode=os.RTLD_LOCAL | os.RTLD_NOW | os.RTLD_DEEPBIND)
    library.llmc_tensor_message.restype = ctypes.c_char_p
    return library


@pytest.fixture
def nothing_left(runtime: ctypes.CDLL) -> Iterator[None]:
    """Every handle of the test is freed in it."""
    before = counts(runtime)[1]
    yield
    assert counts(runtime)[1] == before


def counts(runtime: ctypes.CDLL) -> list[int]:
    found = (ctypes.c_int64 * 3)()
    runtime.llmc_tensor_pool_counts(found)
    return list(found)


def longs(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def empty(runtime: ctypes.CDLL, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: int = _FLOAT32, device: int = 0) -> Handle | None:
    handle = Handle()
    status = runtime.aoti_torch_empty_strided(
        ctypes.c_int64(len(sizes)), longs(*sizes), longs(*strides), dtype, device, 0, ctypes.byref(handle)
    )
    assert (status == 0) == bool(handle.value)
    return handle if status == 0 else None


def over(runtime: ctypes.CDLL, array: np.ndarray, dtype: int = _FLOAT32) -> Handle:
    handle = Handle()
    strides = longs(*(stride // array.itemsize for stride in array.strides))
    assert not runtime.aoti_torch_create_tensor_from_blob(
        Handle(array.ctypes.data),
        ctypes.c_int64(array.ndim),
        longs(*array.shape),
        strides,
        ctypes.c_int64(0),
        dtype,
        0,
        0,
        ctypes.byref(handle),
    )
    return handle


def view(runtime: ctypes.CDLL, base: Handle, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Handle | None:
    handle = Handle()
    status = runtime.aoti_torch__reinterpret_tensor(
        base, ctypes.c_int64(len(sizes)), longs(*sizes), longs(*strides), ctypes.c_int64(offset), ctypes.byref(handle)
    )
    return handle if status == 0 else None


def address(runtime: ctypes.CDLL, handle: Handle) -> int:
    pointer = Handle()
    assert not runtime.aoti_torch_get_data_ptr(handle, ctypes.byref(pointer))
    return pointer.value or 0


def free(runtime: ctypes.CDLL, *handles: Handle | None) -> None:
    for handle in handles:
        assert handle is not None and not runtime.aoti_torch_delete_tensor_object(handle)


def test_the_image_has_what_the_compiler_believes(image: Path) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", str(image)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    theirs = {name for name in names if name.startswith(("aoti_", "Sleef_")) and not name.startswith(SHIM_PREFIX)}
    wide = "avx512f" in isa_level(_LEVELS[-1]).cpu_features
    assert theirs == {name for name in PROVIDED if wide or "f16_" not in name}
    assert f"{SHIM_PREFIX}linear" in names
    dynamic = subprocess.run(["readelf", "-d", str(image)], capture_output=True, text=True, check=True).stdout
    assert f"[{SONAME}]" in dynamic and "torch" not in dynamic


def test_what_is_lacking_is_named() -> None:
    called = ["aoti_torch_clone", "aoti_torch_cpu_topk", "aoti_torch_cpu_sort", "Sleef_sinf16_u10", "aoti_torch_cpu_llmc_linear"]
    assert lacking(called) == [
        "Sleef_sinf16_u10", "aoti_torch_cpu_sort"
    ]  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
def test_a_view_keeps_its_storage_and_counts_from_its_base(runtime: ctypes.CDLL) -> None:
    base = empty(runtime, (4, 6), (6, 1))
    assert base is not None and address(runtime, base) % 64 == 0
    row = view(runtime, base, (2, 3), (3, 1), 6)
    assert row is not None
    deeper = view(runtime, row, (2,), (1,), 4)
    assert deeper is not None
    assert address(runtime, row) == address(runtime, base) + 6 * 4
    assert address(runtime, deeper) == address(runtime, base) + 10 * 4  # as torch._C._dynamo.guards._reinterpret_tensor
    theirs = torch._C._dynamo.guards._reinterpret_tensor
    torch_base = torch.arange(24.0).reshape(4, 6)
    torch_row = theirs(torch_base, (2, 3), (3, 1), 6)
    assert theirs(torch_row, (2,), (1,), 4).storage_offset() == 10
    ctypes.memset(address(runtime, base), 0, 96)
    free(runtime, base, row)
    np.ctypeslib.as_array((ctypes.c_float * 2).from_address(address(runtime, deeper)))[:] = 1.0  # still there
    free(runtime, deeper)


@pytest.mark.usefixtures("nothing_left")
def test_a_second_step_allocates_nothing(runtime: ctypes.CDLL) -> None:
    def step() -> None:
        made = [empty(runtime, (rows, 100), (100, 1)) for rows in (1, 3, 7, 1000)]
        copies = []
        for handle in made:
            copies.append(Handle())
            assert not runtime.aoti_torch_new_tensor_handle(handle, ctypes.byref(copies[-1]))
        free(runtime, *made, *copies)

    step()
    taken = counts(runtime)[0]
    for _ in range(5):
        step()
    assert counts(runtime)[0] == taken


@pytest.mark.usefixtures("nothing_left")
def test_a_copy_is_of_its_own(runtime: ctypes.CDLL) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    handle, copy, contiguous = over(runtime, array), Handle(), ctypes.c_bool()
    assert not runtime.aoti_torch_clone(handle, ctypes.byref(copy))
    array[:] = 0
    assert list((ctypes.c_float * 12).from_address(address(runtime, copy))) == list(range(12))
    across = over(runtime, array.T)
    assert not runtime.aoti_torch_is_contiguous(across, ctypes.byref(contiguous)) and not contiguous.value
    assert runtime.aoti_torch_clone(across, ctypes.byref(Handle())) == 1
    assert b"not contiguous" in runtime.llmc_tensor_message()
    free(runtime, handle, copy, across)


def topk(runtime: ctypes.CDLL, array: np.ndarray, dtype: int, k: int, largest: bool, is_sorted: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values, indices) of a [R, N] array, as bytes of its dtype and int64."""
    base, values, indices = over(runtime, array, dtype), Handle(), Handle()
    status = runtime.aoti_torch_cpu_topk(
        base, ctypes.c_int64(k), ctypes.c_int64(-1), int(largest), int(is_sorted), ctypes.byref(values), ctypes.byref(indices)
    )
    assert status == 0, runtime.llmc_tensor_message()
    count = array.shape[0] * k
    found = [
        np.frombuffer(ctypes.string_at(address(runtime, handle), count * item), kind).reshape(array.shape[0], k)
        for handle, item, kind in ((values, array.itemsize, array.dtype), (indices, 8, np.int64))
    ]
    free(runtime, base, values, indices)
    return found[0], found[1]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, _FLOAT32), (torch.float16, 5), (torch.bfloat16, 15)], ids=str)
def test_the_largest_are_those_of_libtorch_ties_and_nan_included(runtime: ctypes.CDLL, dtype: torch.dtype, code: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, n, k in [(1, 1, 1), (3, 8, 2), (5, 60, 4), (7, 128, 8), (400, 128, 2), (2, 300, 4), (9, 64, 64), (4, 33, 0)]:
        for spread in (1e6, 3):  # few equal values, many of them
            given = torch.randint(-int(spread), int(spread), (rows, n), generator=generator).div(7).to(dtype)
            given[0, n // 2] = float("nan")
            for largest in (True, False):
                for is_sorted in (True, False):
                    theirs = torch.topk(given, k, dim=-1, largest=largest, sorted=is_sorted)
                    bits = torch.int32 if dtype == torch.float32 else torch.int16
                    values, indices = topk(runtime, given.view(bits).numpy(), code, k, largest, is_sorted)
                    assert np.array_equal(indices, theirs.indices.numpy()), (rows, n, k, spread, largest, is_sorted)
                    assert np.array_equal(values, theirs.values.view(bits).numpy())


@pytest.mark.usefixtures("nothing_left")
def test_a_choice_that_makes_no_sense_is_refused(runtime: ctypes.CDLL) -> None:
    array = np.zeros((3, 4), np.float32)
    flat, across, whole = over(runtime, array), over(runtime, array.T), over(runtime, np.zeros((3, 4), np.int64), _INT64)
    for handle, k, dim, reason in [
        (flat, 5, -1, b"the 5 largest of 4"), (flat, -1, -1, b"largest of 4"), (flat, 1, 0, b"another dimension"),
        (across, 1, -1, b"not contiguous"), (whole, 1, -1, b"dtype code 4"),
    ]:  # fmt: skip
        out = ctypes.byref(Handle()), ctypes.byref(Handle())
        assert runtime.aoti_torch_cpu_topk(handle, ctypes.c_int64(k), ctypes.c_int64(dim), 1, 1, *out) == 1
        assert reason in runtime.llmc_tensor_message()
    free(runtime, flat, across, whole)


@pytest.mark.usefixtures("nothing_left")
def test_what_is_out_of_range_is_refused_with_a_reason(runtime: ctypes.CDLL) -> None:
    for sizes, strides, dtype, device, reason in [
        ((2,), (1,), _FLOAT32, 1, b"device type 1"),
        ((2,), (1,), 99, 0, b"dtype code 99"),
        ((-1,), (1,), _FLOAT32, 0, b"out of range"),
        ((2,), (-1,), _FLOAT32, 0, b"out of range"),
        ((1 << 62, 1 << 62), (1 << 62, 1), _FLOAT32, 0, b"out of range"),
        ((1,) * 9, (1,) * 9, _INT64, 0, b"9 dimensions"),
    ]:
        assert empty(runtime, sizes, strides, dtype, device) is None
        assert reason in runtime.llmc_tensor_message()
    assert runtime.llmc_tensor_message() == b""
    base = empty(runtime, (4, 6), (6, 1))
    assert base is not None
    for sizes, strides, offset in [((25,), (1,), 0), ((2,), (24,), 0), ((1,), (1,), 24), ((1,), (1,), -1)]:
        assert view(runtime, base, sizes, strides, offset) is None
        assert b"view" in runtime.llmc_tensor_message()
    free(runtime, base)


# tanh: where it first rounds to 1, one place of the floats below 1, and a hair
@pytest.mark.usefixtures("runtime")  # whose kernels are what the other levels' images need to be mapped
@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize(("name", "bound_ulp"), [("exp", 1.0), ("tanh", 1.0000001)])
def test_vector_functions_are_within_one_ulp_and_have_the_bits_of_libtorch(
    name: str, bound_ulp: float, level: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against long double; against SLEEF in libtorch, all bits (checked once over all 2^32 floats)."""
    ours = ctypes.CDLL(str(build_kernels(level, kernel_cache(tmp_path_factory)).tensor_runtime_so), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    theirs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 88.72283, 88.72284, -87.33655, -103.97, -104.0, 8.664, 1e-38, 1e-45, 1, 2], np.float32)
    x = np.concatenate([edges, random.normal(size=1 << 16).astype(np.float32) * 30, bits[: 1 << 16]])
    x = x[: len(x) // 16 * 16].copy()
    for lanes in (16, 8) if "avx512f" in isa_level(level).cpu_features else (8,):
        apply = _applier(tmp_path_factory, lanes)
        found, other = (apply(getattr(library, f"Sleef_{name}f{lanes}_u10"), x) for library in (ours, theirs))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            exact = getattr(np, name)(x.astype(np.longdouble))
        normal = np.isfinite(exact) & (np.abs(exact) < np.finfo(np.float32).max) & (np.abs(exact) >= np.finfo(np.float32).tiny)
        ulp = np.spacing(np.abs(exact[normal]).astype(np.float32)).astype(np.longdouble)
        assert float((np.abs(found[normal] - exact[normal]) / ulp).max()) <= bound_ulp
        assert np.isnan(found[np.isnan(x)]).all()
        same = (found.view(np.uint32) == other.view(np.uint32)) | (np.isnan(found) & np.isnan(other))
        assert same.all(), x[~same][:5]


def _applier(tmp_path_factory: pytest.TempPathFactory, lanes: int) -> Callable[..., np.ndarray]:
    folder = tmp_path_factory.mktemp("apply")
    (folder / "apply.c").write_text(_APPLY)
    prefix, flag = {8: ("_mm256", "-mavx2"), 16: ("_mm512", "-mavx512f")}[lanes]
    defines = [f"-DVECTOR=__m{lanes * 32}", f"-DLANES={lanes}", f"-DLOAD={prefix}_loadu_ps", f"-DSTORE={prefix}_storeu_ps"]
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", flag, *defines, "apply.c", "-o", "apply.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "apply.so"))

    def apply(function: object, x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        library.apply(function, Handle(x.ctypes.data), Handle(out.ctypes.data), ctypes.c_long(len(x)))
        return out

    return apply
