"""Ask Inductor for C++ code, and for nothing else.

torch._inductor.aot_compile would also run the compiler, with paths, debug lines and the builder's own instruction set in
the result. Here it is stopped once the code is written; `image.py` compiles it.

Three of Inductor's functions are replaced while it runs (torch 2.11 to 2.13 have them alike):
    AotCodeCompiler.compile         receives the code; ours keeps it and compiles nothing
    CppWrapperCpu.get_c_shim_func_name
                                    names an op's C function without its namespace, so that llmc::embedding and aten::embedding
                                    would be one; ours takes the name that the op's own declaration has
    graph.is_same_tensor            merges constants that share memory, and takes all fake tensors for sharing address 0, which
                                    silently gives every layer the first layer's weights; ours compares fakes by identity
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental import _config as fx_config

from llmc.compiler.canonical import set_tensor
from llmc.errors import InternalError
from llmc.kernels.isa import inductor_target
from llmc.kernels.ops import C_SHIMS

# The number of threads Inductor plans for. A constant: the code must not depend on the builder's cores. With `dynamic_threads` it only
# says how much work a loop must have to be spread; the runtime's threads share the loop's rows.
_PLANNED_THREADS = 16

# "llmc::linear" -> the C function that its declaration names, "aoti_torch_cpu_llmc_linear".
SHIM_NAMES: dict[str, str] = {
    op._schema.name: match.group(1) for op, (shim, *_) in C_SHIMS.items() if (match := re.match(r"AOTITorchError (\w+)\(", shim))
}


@dataclass(frozen=True, kw_only=True)
class GeneratedCode:
    """What Inductor wrote. `wrapper`: the model class and the sequence of calls. `kernels`: the fused loops."""

    wrapper: str
    kernels: str


def generate(graph: GraphModule, isa: str) -> GeneratedCode:
    """Lower a graph to C++ for AOTInductor's C interface, constants left out.

    Args:
        graph: as the passes leave it; not changed. Its constants may be fake.
        isa: instruction-set level; decides the width of the vectors in the code.

    Raises:
        InternalError: Inductor wrote no code.
    """
    module, inputs = _for_inductor(graph)
    caught: list[GeneratedCode] = []

    def keep(lowering: Any, wrapper: str, kernels: str, *rest: Any, **more: Any) -> list[str]:
        caught.append(GeneratedCode(wrapper=wrapper, kernels=kernels))
        return []

    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with inductor_target(isa), _replaced(keep), oblivious, torch.no_grad(), quiet():
        torch._inductor.aot_compile(module, inputs, options=_options())
    if len(caught) != 1:
        raise InternalError(f"Inductor wrote {len(caught)} programs, expected one; please report this model")
    return caught[0]


def _options() -> dict[str, Any]:
    from torch._inductor import config

    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.link_libtorch": False,
        "aot_inductor.custom_ops_to_c_shims": dict(C_SHIMS),
        "aot_inductor.precompile_headers": False,
        "aot_inductor.check_lowerbound": False,  # sizes of 1 are welcome; only read when AOTI_RUNTIME_CHECK_INPUTS is set
        "always_keep_tensor_constants": True,  # small real ones would be written into the code, and a rule for all is simpler
        "size_asserts": False,  # shapes were settled by the trace; the runtime checks its inputs
        "alignment_asserts": False,
        "cpp.descriptive_names": False,  # what a loop is called after differs between a process's first compiles and its later ones
        "cpp.threads": _PLANNED_THREADS,
        "cpp.dynamic_threads": True,
        "freezing": False,
        "max_autotune": False,
        "compile_threads": 1,
        "force_disable_caches": True,
    }
    known = config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


def _for_inductor(graph: GraphModule) -> tuple[GraphModule, tuple[Any, ...]]:
    """A copy that returns a tuple and registers every constant, with its inputs' fake values."""
    root, copy = torch.nn.Module(), Graph()
    seen: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            set_tensor(root, str(node.target), _constant(graph, str(node.target)))
        if node.op == "output":
            copy.output((seen[node.args[0]],))
        else:
            seen[node] = copy.node_copy(node, seen.__getitem__)
    inputs = tuple(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder")
    return GraphModule(root, copy, class_name="Step"), inputs


def _constant(graph: GraphModule, name: str) -> Tensor:
    found: Any = graph
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


@contextlib.contextmanager
def _replaced(compile_code: Any) -> Iterator[None]:
    import torch._inductor.graph
    from torch._inductor.codecache import AotCodeCompiler
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original_name, original_same = CppWrapperCpu.get_c_shim_func_name, torch._inductor.graph.is_same_tensor  # type: ignore[attr-defined]

    def shim_name(kernel: str, device: str) -> str:
        return SHIM_NAMES.get(kernel) or str(original_name(kernel, device))

    def same(first: Tensor, second: Tensor) -> bool:
        if isinstance(first, FakeTensor) or isinstance(second, FakeTensor):
            return first is second
        return bool(original_same(first, second))

    with (
        mock.patch.object(AotCodeCompiler, "compile", compile_code),
        mock.patch.object(CppWrapperCpu, "get_c_shim_func_name", staticmethod(shim_name)),
        mock.patch.object(torch._inductor.graph, "is_same_tensor", same),
    ):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide Inductor's warnings about what it falls back for (`lower.py` checks the calls itself, and refuses), and torch's about itself."""
    logger = logging.getLogger("torch._inductor")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own trees through an `isinstance` that it has deprecated; nobody here can act on that
            warnings.filterwarnings("ignore", category=FutureWarning, message=r"`isinstance\(treespec, LeafSpec\)`")
            yield
    finally:
        logger.setLevel(before)
