"""Compile a launch for a GPU that is not there: Triton and the assembler in its wheel need neither a driver nor a device.

`python -m llmc.kernels.aot` compiles every kernel of `kernels/catalogue.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmc.errors import InternalError

from .catalogue import catalogue
from .cuda_targets import cuda_target
from .launch import Argument, Device, Launch
from .plain_linear.tuning import TMA_CAPABILITY

SM_90 = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_LAYOUT = re.compile(r"nvidia_mma<\{.*?warpsPerCTA = \[\d+, (\d+)\], instrShape = \[([\d, ]+)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledLaunch:
    """One kernel's machine code and what a launch of it needs."""

    entry: str
    cubin: bytes
    ptx: str
    num_warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int  # spills, and local arrays, which our kernels have none of
    scratch_bytes: int  # of the GPU's memory a program, at multiples of 128, behind the pointer after the arguments
    matrix_instructions: tuple[str, ...]  # "wgmma", "mma"; a dot product's bits depend on the kind
    matrix_layouts: tuple[str, ...]  # how each kind of tile lies over warps, as "instruction MxNxK, warps along N"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.cubin).hexdigest()


def compile_launch(launch: Launch, target: GPUTarget = SM_90) -> CompiledLaunch:
    """Compile one launch; its tensors may be fake. Only dtypes and offsets matter: storages are taken to begin at multiples of 16.

    Raises:
        InternalError: an argument has a type no kernel of ours takes.
    """
    signature, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants), attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    with _without_line_information():
        compiled = triton.compile(source, target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return CompiledLaunch(
        entry=compiled.metadata.name,
        cubin=compiled.asm["cubin"],
        ptx=ptx,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        stack_bytes=stack,
        scratch_bytes=_scratch(compiled.metadata),
        matrix_instructions=tuple(sorted({m.group(1) for m in re.finditer(r"\b(wgmma|mma)\.\S*sync", ptx)})),
        matrix_layouts=tuple(sorted({f"{m[2]}, {m[1]}" for m in _LAYOUT.finditer(compiled.asm["ttgir"])})),
    )


def _scratch(metadata: Any) -> int:
    """Bytes a program asks for.

    Raises:
        InternalError: at other places than multiples of 128, or for profiling.
    """
    if metadata.global_scratch_align > 128 or metadata.global_scratch_size % metadata.global_scratch_align or metadata.profile_scratch_size:
        raise InternalError(f"kernel {metadata.name} wants scratch memory that a plan does not give; please report this")
    return int(metadata.global_scratch_size)


def intermediate_code(launch: Launch, target: GPUTarget = SM_90) -> Any:
    """Triton's intermediate code of a launch before any optimisation, an MLIR module: one parameter per argument, none folded away."""
    signature, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants), attrs=attributes)
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options({"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    made.context = context  # as triton.compile does: a module does not keep its context alive
    return made


def signature_text(launch: Launch) -> str:
    """Launches with the same text compile to the same image."""
    name = f"{launch.kernel.fn.__module__}.{launch.kernel.__name__}"
    return f"{name} {_signature(launch)} {launch.constants} {launch.num_warps} {launch.num_stages}"


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    names = [p.name for p in launch.kernel.params]
    signature = {n: "constexpr" if n in launch.constants else _type(n, launch.args[n]) for n in names}
    return signature, {(names.index(n),): [["tt.divisibility", 16]] for n, value in launch.args.items() if _divisible(value)}


@contextlib.contextmanager
def _without_line_information() -> Iterator[None]:
    """Line information holds paths, so that two builds of one kernel would differ."""
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        yield


def _type(name: str, value: Argument) -> str:
    if isinstance(value, Tensor) and value.dtype in _POINTERS:
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise InternalError(f"kernel argument {name}: expected a tensor, an int or a float, got {value!r}")


def _divisible(value: Any) -> bool:
    """Whether the compiler may take the argument for a multiple of 16; a view's start counts, its storage's start is aligned."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack, as the assembler left them in the image."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(cubin)
        image.flush()
        shown = subprocess.run([str(tool), "--dump-resource-usage", image.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise InternalError(f"{tool} showed no resource usage: {shown!r}")
    return int(found.group(1)), int(found.group(2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every GPU kernel without a GPU; one JSON object a kernel.")
    parser.add_argument("--target", default="cuda:h200", help="one of `llmc compile --target list`'s GPUs")
    parser.add_argument("--builds", type=int, default=2, help="how often each is compiled from source, to compare the bits")
    parser.add_argument("case", nargs="*", help="only these cases of the catalogue")
    chosen = parser.parse_args()
    described = cuda_target(chosen.target)
    target = GPUTarget("cuda", described.capability_number, 32)
    device = Device(num_sms=described.num_sms, shared_bytes=described.shared_memory_per_block_bytes)
    for name, launches in catalogue(device, tma=described.capability_number >= TMA_CAPABILITY).items():
        different = {signature_text(launch): launch for launch in launches}  # a search launches one kernel many times
        for launch in different.values() if not chosen.case or name in chosen.case else ():
            images = [_build(launch, target) for _ in range(chosen.builds)]
            facts = {k: v for k, v in dataclasses.asdict(images[0]).items() if k not in ("cubin", "ptx")}
            sizes = {"cubin_bytes": len(images[0].cubin), "sha256": images[0].sha256, "images": len({i.sha256 for i in images})}
            print(json.dumps({"case": name, **facts, **sizes}), flush=True)


def _build(launch: Launch, target: GPUTarget) -> CompiledLaunch:
    """From source, whatever Triton's cache holds."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return compile_launch(launch, target)


if __name__ == "__main__":
    main()
