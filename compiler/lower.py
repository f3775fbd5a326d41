"""From a graph to machine code for a CPU, weights left outside.

    GraphModule -> LoweredModel

The image has AOTInductor's C interface (torch/csrc/inductor/aoti_runtime/interface.h). A runtime opens the kernels with
RTLD_GLOBAL and the tensor runtime, or where the image needs them libtorch_cpu and the shim, then the image, binds each constant by its
name, and runs; no Python torch is involved.

What Inductor decided is not trusted but checked in the code it wrote: which functions are called, and that nobody but attention
touches a KV cache.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch.fx import GraphModule

from llmc.compiler.image import compile_image, compiler_version
from llmc.compiler.inductor import SHIM_NAMES, GeneratedCode, generate
from llmc.errors import InternalError, UnsupportedModel
from llmc.kernels.isa import TargetSpec

# ATen functions that lowered code may call: row by row, so that a row's bits do not depend on its batch.
ROWWISE_CALLS = frozenset({"aoti_torch_cpu_topk"})
# Library matrix products: right, but a row alone may get other bits than in a batch. Wanted only where llmc.linear is not used.
GEMM_CALLS = frozenset({"aoti_torch_cpu_mm_out", "aoti_torch_cpu_addmm_out", "aoti_torch_cpu_bmm_out", "aoti_torch_cpu_baddbmm_out"})
# What may touch a KV cache.
_CACHE_OPS = tuple(SHIM_NAMES[f"llmc::{name}"] for name in ("paged_attention", "rope_kv_write", "paged_attend"))


@dataclass(frozen=True, kw_only=True)
class LoweredModel:
    """A model image and what is known of it.

    path: the shared object. sha256: of it, hex.
    constants: the image's own name of each constant (GetConstantOriginalFQN) -> constant name in the weight table.
    calls: op of ours ("llmc::linear"), or C function of ATen's -> number of calls, for the report.
    seconds: "inductor", "compiler" -> time; not part of any artifact.
    """

    path: Path
    sha256: str
    constants: Mapping[str, str]
    calls: Mapping[str, int]
    num_kernels: int
    compiler: str
    seconds: Mapping[str, float]


def lower_aoti(graph: GraphModule, target: TargetSpec, out: Path, *, jobs: int = 1, allow_library_gemm: bool = False) -> LoweredModel:
    """Compile a graph into a model image.

    Args:
        graph: as the passes leave it; not changed.
        target: decides the instructions, whatever this machine has.
        out: the shared object to write.
        jobs: C++ compilers at the same time.
        allow_library_gemm: accept GEMM_CALLS; a row's bits may then depend on its batch.

    Raises:
        UnsupportedModel: the code calls an op that llmc has no C function for.
        ConfigError: no C++ compiler.
        InternalError: the code copies a KV cache, or does not compile.
    """
    started = time.perf_counter()
    code = generate(graph, target.isa)
    calls = called_ops(code)
    _check_calls(calls, allow_library_gemm)
    check_caches(code, graph)
    generated = time.perf_counter()
    compile_image(code, target.isa, out, jobs=jobs)
    compiled = time.perf_counter()
    return LoweredModel(
        path=out,
        sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        constants=MappingProxyType(_constants(code, graph)),
        calls=MappingProxyType(dict(sorted(calls.items()))),
        num_kernels=len(re.findall(r'^extern "C"\s+void ', code.kernels, re.MULTILINE)),
        compiler=compiler_version(),
        seconds=MappingProxyType({"inductor": generated - started, "compiler": compiled - generated}),
    )


def called_ops(code: GeneratedCode) -> Counter[str]:
    """Ops that the program calls outside its own loops, with how often: ours by name, others by their C function.

    Anything that would go through the proxy executor or the dispatcher counts under that function's name.
    """
    ours = {function: op for op, function in SHIM_NAMES.items()}
    functions = re.findall(r"\b(aoti_torch_(?:cpu_|proxy_executor|call_dispatcher)\w*)\(", _body(code))
    return Counter(ours.get(function, function) for function in functions)


def check_caches(code: GeneratedCode, graph: GraphModule) -> None:
    """Check that each KV cache goes into attention, and into what writes it before, and nowhere else: a copy of a cache would be the
    slowest line of the program.

    Raises:
        InternalError: names the cache and the line.
    """
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    body = _body(code)
    held = dict(enumerate(names))
    for variable, index in re.findall(r"auto (\w+) = std::move\(inputs\[(\d+)\]\);", body):
        name = held[int(index)]
        if not name.startswith(("k_cache_", "v_cache_")):
            continue
        uses = [line.strip() for line in body.splitlines() if re.search(rf"\b{variable}\b", line) and "std::move(inputs[" not in line]
        harmless = (f"{variable}.reset();", f"auto {variable}_size = {variable}.sizes();", "if (_check_aoti_runtime_check_inputs_env())")
        wrong = [line for line in uses if not any(f"{op}(" in line for op in _CACHE_OPS) and not line.startswith(harmless)]
        if wrong:
            raise InternalError(f"lowered code uses {name} outside attention: {wrong[0][:200]}; please report this model")
        if not any(f"{op}(" in line for op in _CACHE_OPS for line in uses):
            raise InternalError(f"lowered code never passes {name} to attention; please report this model")


def _body(code: GeneratedCode) -> str:
    """The function that runs a step."""
    start = code.wrapper.index("void AOTInductorModel::run_impl(")
    return code.wrapper[start:]


def _check_calls(calls: Counter[str], allow_library_gemm: bool) -> None:
    allowed = ROWWISE_CALLS | GEMM_CALLS if allow_library_gemm else ROWWISE_CALLS
    for name in calls:
        if name in allowed or name in SHIM_NAMES:
            continue
        if name in GEMM_CALLS:
            raise UnsupportedModel(
                f"lowered code calls a library matrix product ({name}), whose rows depend on their batch, not llmc.linear"
            )
        raise UnsupportedModel(f"lowered code calls {name}, for which llmc's runtime has no C function; please report this model")


def _constants(code: GeneratedCode, graph: GraphModule) -> dict[str, str]:
    """Match the image's constants with the graph's, one to one.

    Raises:
        InternalError: a constant was merged with another, dropped or added.
    """
    wanted = list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"))
    found = re.findall(r'constants_info_\[\d+\]\.original_fqn = "([^"]*)";', code.wrapper)
    if sorted(found) != sorted(wanted):
        missing = sorted(set(wanted) ^ set(found)) or found
        raise InternalError(
            f"the image has {len(found)} constants, the graph {len(wanted)} (first difference: {missing[0]}); please report this"
        )
    return {name: name for name in found}
