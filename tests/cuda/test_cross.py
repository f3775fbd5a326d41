"""Cross compilation: a graph becomes cubins with no GPU; each patch, left out, shows the symptom it is there for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc.artifacts.cubin import read_cubin
from llmc.compiler.cuda import cross
from llmc.compiler.cuda.cross import cross_cuda
from llmc.compiler.cuda.schedule import check_calls, check_constants, check_kernel, check_same_images, schedule
from llmc.errors import InternalError, UnsupportedModel
from llmc.kernels.cuda_targets import cuda_target
from tests.cuda.toy import toy_graph

H200 = cuda_target("cuda:h200")


def build(target: str = "cuda:h200", width: int = 64) -> list[bytes]:
    return schedule(toy_graph(width), cuda_target(target)).images()


def two_builds_differ() -> None:
    first = build()
    check_same_images(first, build())


def triton_is_found() -> None:
    with contextlib.suppress(Exception):  # what a CPU compile asks earlier in the process
        torch.utils._triton.has_triton()
    with cross_cuda(H200):
        if not torch.utils._triton.has_triton():
            raise LookupError("has_triton() is False")


def kernels_are_kept_elsewhere() -> None:
    with cross_cuda(H200):
        if os.environ.get("TRITON_CACHE_DIR", "") == os.environ["LLMC_TEST_TRITON_CACHE"]:
            raise LookupError("kernels come from the user's cache")


def wide_rows() -> None:
    build(width=8192)


# Patch -> what it is tried on, the error without it, words of its message.
SYMPTOMS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "triton_driver": (build, InternalError, "0 active drivers|Could not find an active GPU backend"),
    "device_interface": (build, InternalError, "not compiled with CUDA|no NVIDIA driver"),
    "device_properties": (build, InternalError, "not compiled with CUDA|no NVIDIA driver"),
    "raw_stream": (build, InternalError, "_cuda_getCurrentRawStream"),
    "constants_by_identity": (build, InternalError, "the schedule has 2 constants, the graph 3"),
    "every_gpu_is_big": (lambda: build("cuda:l4"), InternalError, "No choices exist"),
    "one_configuration": (wide_rows, ValueError, "too many values"),
    "tuner_on_node": (build, UnsupportedModel, "triton_kernel_wrapper"),
    "no_line_info": (two_builds_differ, InternalError, "two builds of the same input differ"),
    "own_kernel_cache": (kernels_are_kept_elsewhere, LookupError, "user's cache"),
    "fresh_answers": (triton_is_found, LookupError, "False"),
}


@pytest.fixture(autouse=True)
def no_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LLMC_TEST_TRITON_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)


@pytest.mark.parametrize("name", cross.PATCHES)
def test_each_patch_cures_its_symptom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "raw_stream" and torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch has the function; the patch is for a CPU build")
    probe, error, words = SYMPTOMS[name]
    monkeypatch.delitem(cross.PATCHES, name)
    with pytest.raises(error, match=words):
        probe()


def test_with_all_patches_no_probe_fails() -> None:
    for probe in dict.fromkeys(probe for probe, _, _ in SYMPTOMS.values()):
        probe()


def test_the_device_guard_cures_its_symptom() -> None:
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from llmc.compiler.cuda.cross import _load_device_guard
def index():
    with FakeTensorMode():
        torch.empty(4, 4, device="cuda:0")[torch.zeros(2, dtype=torch.int64, device="cuda:0")]
try:
    index()
    print("needless")
except RuntimeError as error:
    print(error)
_load_device_guard()
index()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.version.cuda is not None or "not linked with support for cuda" in done.stdout


def test_nothing_stays_patched() -> None:
    before = (torch.cuda.get_device_properties, dict(os.environ), torch.cuda.is_available())
    with cross_cuda(H200):
        assert torch.cuda.get_device_properties().multi_processor_count == 132
    assert (torch.cuda.get_device_properties, dict(os.environ), torch.cuda.is_available()) == before
    assert not hasattr(torch._C, "_cuda_getCurrentRawStream") or torch.version.cuda is not None


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_90"])
def test_images_are_for_the_target_and_fit_it(name: str) -> None:
    target = cuda_target(name)
    made = schedule(toy_graph(), target)
    assert made.calls == {} and sorted(made.constants) == ["first", "second", "table"]
    for kernel in made.kernels.values():
        assert read_cubin(kernel.image, kernel.entry).architecture == target.capability_number
        assert kernel.kernel.threads == (32 * kernel.num_warps, 1, 1)
        assert len(kernel.kernel.parameters) >= 3


def test_checks_refuse_by_name() -> None:
    graph = toy_graph()
    made = schedule(graph, H200)
    kernel = next(iter(made.kernels.values()))
    with pytest.raises(InternalError, match="another architecture than sm_80"):
        check_kernel(kernel, cuda_target("cuda:sm_80"))
    with pytest.raises(InternalError, match="spills: 0 bytes.*budget is -1"):
        check_kernel(kernel, H200, spill_budget_bytes=-1)
    with pytest.raises(UnsupportedModel, match="aten.bmm.default .2 times."):
        check_calls({"aten.bmm.default": 2, "llmc.paged_attention.default": 1}, ["llmc.paged_attention.default"])
    with pytest.raises(InternalError, match="3 and 2 images"):
        check_same_images(made.images(), made.images()[:-1])
    graph.graph.find_nodes(op="get_attr")[0].target = "another"
    with pytest.raises(InternalError, match="first difference: another"):
        check_constants(graph, made.graph)
