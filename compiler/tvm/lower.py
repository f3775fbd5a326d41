"""From a Relax module to machine code for a CPU, weights left outside.

    GraphModule -> TvmImage

The image is one shared object: the functions that TVM generated through LLVM, the bytecode that calls them in order (which TVM's
runtime interprets), and the C++ beside this file. A runtime opens libtvm_ffi and libtvm_runtime, the kernels, then the image; no Python
of TVM's is involved. TVM's own loops run on one thread; llmc's kernels, which hold nearly all of a step's work, spread theirs as
everywhere.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi.libinfo
from torch.fx import GraphModule
from tvm import relax
from tvm.relax.backend.cpu_generic.pipeline import dataflow_lower_passes, finalize_passes, legalize_passes

import llmc.kernels
from llmc.compiler.image import find_compiler, run_compiler
from llmc.compiler.tvm.relax_graph import to_relax
from llmc.kernels.isa import TargetSpec, isa_level

# LLVM's name of each level's processor, and what it has besides.
_PROCESSORS = {
    "x86-64-v3": ("x86-64-v3", ()),
    "x86-64-v4": ("x86-64-v4", ()),
    "x86-64-v4+bf16": ("x86-64-v4", ("+avx512bf16",)),
    "x86-64-v4+bf16+amx": ("x86-64-v4", ("+avx512bf16",)),  # tiles are for our own kernels
}
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-w")
_SOURCES = ("extern_kernels.cpp", "step.cpp")
_LINK = ("-shared", "-s", "-Wl,--build-id=none", "-Wl,-z,relro,-z,now", "-Wl,--hash-style=gnu")


@dataclass(frozen=True, kw_only=True)
class TvmImage:
    """A model image.

    constants: names in the weight table, in the order in which the program takes them behind its inputs.
    calls: op of ours that the program calls -> number of calls. num_kernels: functions that TVM generated.
    """

    path: Path
    sha256: str
    constants: tuple[str, ...]
    calls: Mapping[str, int]
    num_kernels: int
    seconds: Mapping[str, float]


def lower_tvm(graph: GraphModule, target: TargetSpec, out: Path) -> TvmImage:
    """Compile a graph into a model image.

    Args:
        graph: as the passes leave it; not changed.
        target: decides the instructions, whatever this machine has.
        out: the shared object to write.

    Raises:
        UnsupportedModel: an op has no converter; named.
        ConfigError: no C++ compiler.
        InternalError: the image does not link.
    """
    started = time.perf_counter()
    program = to_relax(graph)
    executable = relax.build(program.module, target=tvm_target(target), relax_pipeline=_pipeline())
    generated = time.perf_counter()
    work = out.parent / (out.name + ".build")
    work.mkdir()
    try:
        executable.export_library(
            str(work / "image.so"), workspace_dir=str(work), fcompile=lambda _, objects, **__: _link(objects, target, work)
        )
        (work / "image.so").replace(out)
    finally:
        shutil.rmtree(work)
    return TvmImage(
        path=out,
        sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        constants=program.constants,
        calls={f"llmc::{name}": count for name, count in program.extern_calls.items()},
        num_kernels=len(_generated(executable)),
        seconds={"tvm": generated - started, "linker": time.perf_counter() - generated},
    )


def tvm_target(target: TargetSpec) -> tvm.target.Target:
    """TVM's description of a level; nothing in it comes from this machine."""
    processor, features = _PROCESSORS[target.isa]
    return tvm.target.Target(
        {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": processor, "mattr": list(features), "num-cores": 1}
    )


def _pipeline() -> tvm.transform.Sequential:
    """TVM's own pipeline for CPUs, but for what looks for libraries of its: fusing, then memory planned ahead where sizes are known."""
    target = tvm.target.Target("llvm")  # the functions below ask for one and look at none
    return tvm.transform.Sequential([*legalize_passes(target), *dataflow_lower_passes(target), *finalize_passes(target)])


def _generated(executable: relax.VMExecutable) -> list[str]:
    """Functions that TVM generated and the bytecode calls."""
    return [name for name in set(re.findall(r"call\s+(\S+)", executable.as_text())) if not name.startswith(("vm.", "llmc_tvm_"))]


def _link(objects: list[str], target: TargetSpec, work: Path) -> None:
    """TVM's objects and ours into one image, from relative names, so that no path gets in."""
    kernels, own = Path(llmc.kernels.__path__[0]), Path(__file__).parent
    for name in (*_SOURCES, "tensor.h"):
        shutil.copyfile(own / name, work / name)
    includes = [f"-I{kernels}", "-isystem", tvm_ffi.libinfo.find_include_path(), "-isystem", tvm_ffi.libinfo.find_dlpack_include_path()]
    compiler, ours = find_compiler(), [f"{name}.o" for name in _SOURCES]
    for name, compiled in zip(_SOURCES, ours, strict=True):
        run_compiler([compiler, *_FLAGS, *isa_level(target.isa).gcc_flags, *includes, "-c", name, "-o", compiled], work)
    run_compiler([compiler, *ours, *(Path(name).name for name in objects), *_LINK, "-o", "image.so"], work)
