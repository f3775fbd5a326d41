"""Let Inductor and Triton compile for a described GPU, with no GPU and no driver.

    with cross_cuda(cuda_target("cuda:h200")):
        ... torch._inductor.aot_compile(graph on fake cuda:0 tensors, options=OPTIONS)

Nothing is launched, nothing is allocated, nothing is timed. `torch.cuda.is_available()` stays False: what would then initialise a
driver (random state, memory statistics, graph pools) is never reached, and only what asks about the GPU is answered.

Each patch below is named after what it replaces; its comment says which symptom it cures, and tests/cuda/test_cross.py leaves each
one out and sees that symptom. Written for torch 2.13 (CPU build) and triton 3.7.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmc.compiler.cuda.device import device_facts, static_driver, static_interface
from llmc.errors import ConfigError
from llmc.kernels.cuda_targets import CudaTarget

Patch = Callable[[CudaTarget], AbstractContextManager[object]]

DEVICE = torch.device("cuda:0")
_open_targets: list[CudaTarget] = []  # the module state that is mutated is the process's, and so is this

# Options for torch._inductor.aot_compile that belong to a cross compilation.
OPTIONS: dict[str, Any] = {
    "fx_wrapper": True,  # the schedule as a graph of launches, not as C++ that calls libtorch
    "triton.autotune_at_compile_time": False,  # would launch kernels
    "max_autotune_gemm": True,  # matrix products by Triton templates ...
    "max_autotune_gemm_backends": "TRITON",  # ... and by nothing else: no library is there when a plan runs
    "test_configs.max_mm_configs": 1,  # exactly one configuration, so none is timed
    "shape_padding": False,  # decided by a benchmark
    "size_asserts": False,  # the FX wrapper cannot hold Python lines, and shapes are settled by the trace
    "alignment_asserts": False,
    "scalar_asserts": False,
    "freezing": False,
    "always_keep_tensor_constants": True,
    "compile_threads": 1,  # worker processes have none of these patches
    "force_disable_caches": True,  # a cached kernel may be another target's
}


@contextlib.contextmanager
def cross_cuda(target: CudaTarget) -> Iterator[CudaTarget]:
    """While open, torch's compiler and Triton take `target` for the GPU of this machine. Mutates their module state.

    Inside another one for the same target nothing more is done, so what is compiled there is kept as long as the outer is open.

    Raises:
        ConfigError: triton is not installed.
    """
    require_triton()
    if _open_targets and _open_targets[-1] == target:
        yield target
        return
    _load_device_guard()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_devices)  # runs last: leave no answer about this target behind
        for patch in PATCHES.values():
            stack.enter_context(patch(target))
        _open_targets.append(target)
        stack.callback(_open_targets.pop)
        yield target


def require_triton() -> None:
    """Raise ConfigError where the `cuda` extra is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ConfigError("compiling for a CUDA target needs triton, which is not installed; pip install 'llmc[cuda]'") from None


# --- the patches ------------------------------------------------------------------------------------------------------------


def _triton_driver(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: "0 active drivers" of Triton's, or "Could not find an active GPU backend" of Inductor's, whichever asks first."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        import triton
        from triton.backends import Backend, backends

        driver = static_driver(target)
        with mock.patch.dict(backends, {"nvidia": Backend(compiler=backends["nvidia"].compiler, driver=driver)}):
            triton.runtime.driver.set_active(driver())
            try:
                yield
            finally:
                triton.runtime.driver.reset_active()

    return patched()


def _device_interface(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: "Torch not compiled with CUDA enabled" where Inductor asks for SMs to split a reduction."""
    from torch._dynamo import device_interface

    device_interface.init_device_reg()
    interface = static_interface(target)
    return mock.patch.dict(device_interface.device_interfaces, {"cuda": interface, "cuda:0": interface})


def _device_properties(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: "Torch not compiled with CUDA enabled" where a matrix product's template asks whether it may use TMA."""
    facts = device_facts(target)
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: facts))
    stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: target.compute_capability))
    return stack


def _raw_stream(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: "cannot import name '_cuda_getCurrentRawStream'" from every generated kernel's module, in a CPU build of torch."""
    return mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)


def _constants_by_identity(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: none, and wrong answers. Inductor merges constants of equal shape at equal addresses; every fake is at address 0."""
    from torch._inductor import graph

    inductor_graph: Any = graph
    original = inductor_graph.is_same_tensor

    def same(first: Tensor, second: Tensor) -> bool:
        if isinstance(first, FakeTensor) or isinstance(second, FakeTensor):
            return first is second
        return bool(original(first, second))

    return mock.patch.object(inductor_graph, "is_same_tensor", same)


def _every_gpu_is_big(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: "No choices exist for backend" for every matrix product on a GPU with fewer than 68 SMs (L4): no template is offered."""
    from torch._inductor import utils

    return mock.patch.object(utils, "is_big_gpu", lambda index_or_device=0: True)


def _one_configuration(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: each reduction is compiled in several configurations, though nothing can be timed; the schedule takes the first."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    original = CachingAutotuner.precompile

    @functools.wraps(original)
    def precompile(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self.configs[1:]
        return original(self, *args, **kwargs)

    return mock.patch.object(CachingAutotuner, "precompile", precompile)


def _tuner_on_node(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: the schedule's launches name a Python function; which image was compiled for it is nowhere in the graph."""
    from torch._inductor.codegen.wrapper_fxir import FxConverter

    original = FxConverter._generate_triton_call

    @functools.wraps(original)
    def generate(self: Any, line: Any) -> None:
        original(self, line)
        node = next(iter(reversed(self.gm.graph.nodes)))
        node.meta["tuner"] = self.kernels[line.kernel_name].tuner

    return mock.patch.object(FxConverter, "_generate_triton_call", generate)


def _no_line_info(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: two builds differ in every cubin, which holds the path and lines of its temporary source file."""
    return mock.patch.dict(os.environ, {"TRITON_DISABLE_LINE_INFO": "1"})


def _own_kernel_cache(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: Triton finds a kernel in the user's cache that was compiled earlier, perhaps with line information."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="llmc-triton-") as folder:
            places = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            with mock.patch.dict(os.environ, places):
                yield

    return patched()


def _fresh_answers(target: CudaTarget) -> AbstractContextManager[object]:
    """Symptom: `has_triton()` stays False, since a CPU compile in the same process asked before and torch remembers the answer."""
    _forget_devices()
    return contextlib.nullcontext()


# In order of entry. _fresh_answers stands last: entering the others must not have filled a cache.
PATCHES: dict[str, Patch] = {
    "triton_driver": _triton_driver,
    "device_interface": _device_interface,
    "device_properties": _device_properties,
    "raw_stream": _raw_stream,
    "constants_by_identity": _constants_by_identity,
    "every_gpu_is_big": _every_gpu_is_big,
    "one_configuration": _one_configuration,
    "tuner_on_node": _tuner_on_node,
    "no_line_info": _no_line_info,
    "own_kernel_cache": _own_kernel_cache,
    "fresh_answers": _fresh_answers,
}


def _forget_devices() -> None:
    """Empty every cache of torch's that holds an answer about a device."""
    from torch._inductor import utils
    from torch._inductor.runtime import hints
    from torch.utils import _triton

    cached = [hints.DeviceProperties.create, *(vars(module)[name] for module in (utils, _triton) for name in sorted(vars(module)))]
    for function in cached:
        if hasattr(function, "cache_clear") and hasattr(function, "cache_info"):
            function.cache_clear()


# --- the device guard -------------------------------------------------------------------------------------------------------


@functools.cache
def _load_device_guard() -> None:
    """Symptom: "PyTorch is not linked with support for cuda devices" when a fake CUDA tensor is indexed. Stays for the process.

    Raises:
        ConfigError: no C++ compiler.
    """
    if torch.version.cuda is not None:
        return
    include = Path(torch.__file__).parent / "include"
    source = Path(__file__).with_name("device_guard.cpp")
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(prefix="llmc-guard-") as folder:
        library = Path(folder) / "device_guard.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
        command += [f"-L{include.parent / 'lib'}", "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ConfigError(f"C++ compiler {compiler!r} is not there; install g++ or set CXX") from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"{compiler} cannot compile a small file against torch's headers: {error.stderr.strip()[:500]}") from None
        ctypes.CDLL(str(library))  # registers itself; the mapping outlives the file
