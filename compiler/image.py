"""Compile generated C++ into a model image: one shared object with AOTInductor's C interface.

Every flag stands here. The same code gives the same bytes on every machine with this compiler and this torch: sources are
compiled under fixed relative names, there are no debug lines, no build id and no timestamps, and the one absolute path that
would get in, that of torch's headers in their check messages, is mapped away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from llmc.compiler.inductor import GeneratedCode
from llmc.errors import ConfigError, InternalError
from llmc.kernels.aoti_runtime import SONAME, lacking
from llmc.kernels.isa import isa_level

# As Inductor compiles its own loops: errno and traps are given up, nothing that changes a sum is. -ffp-contract=off: a fused
# multiply-add appears where the code asks for one. No -fno-math-errno beside it, for the same bits as Inductor's.
_FLAGS = (
    "-std=c++20", "-fPIC", "-fopenmp", "-DNDEBUG", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off",
    "-fexcess-precision=fast", "-fno-tree-loop-vectorize", "-w",
)  # fmt: skip
_DEFINES = ("-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER", "-DC10_USING_CUSTOM_GENERATED_MACROS")
_LINK = ("-shared", "-fopenmp", "-s", "-Wl,--build-id=none", "-Wl,--as-needed", "-Wl,-z,relro,-z,now", "-Wl,--hash-style=gnu")

# The wrapper only calls; -O1 takes half the time of -O2 and the program is as fast.
_WRAPPER_OPT, _KERNEL_OPT = "-O1", "-O3"

# AOTInductor's runtime header wants the bytes of constants packed into the image. There are none.
_NO_CONSTANTS = (
    '\nextern "C++" { __attribute__((visibility("hidden"))) uint8_t _binary_constants_bin_start[8] = {0};'
    ' __attribute__((visibility("hidden"))) uint8_t _binary_constants_bin_end[8] = {0}; }\n'
)


@dataclass(frozen=True, kw_only=True)
class _Unit:
    name: str
    source: str
    opt: str


def compile_image(code: GeneratedCode, isa: str, out: Path, *, jobs: int = 1) -> None:
    """Compile and link. The image asks for the tensor runtime by name, unless it calls what only libtorch has (`only_libtorch_has`).

    Args:
        code: what Inductor wrote.
        isa: instruction-set level; the only source of -m flags.
        out: the shared object; its folder holds intermediate files under fixed names meanwhile.
        jobs: compilers at the same time.

    Raises:
        ConfigError: there is no C++ compiler, or it cannot compile for the level.
        InternalError: the code does not compile.
    """
    work = out.parent / (out.name + ".build")
    work.mkdir()
    units = [
        _Unit(name="wrapper", source=code.wrapper + _NO_CONSTANTS, opt=_WRAPPER_OPT),
        _Unit(name="kernels", source=_without_paths(code.kernels), opt=_KERNEL_OPT),
    ]
    try:
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            list(pool.map(lambda unit: _compile(unit, isa, work), units))
        objects = [f"{unit.name}.o" for unit in units]
        run_compiler([find_compiler(), *objects, *_LINK, "-o", "image.so"], work)
        if not only_libtorch_has(work / "image.so"):
            # A library of that name with nothing in it makes the linker write the name down.
            run_compiler([find_compiler(), "-shared", "-nostdlib", f"-Wl,-soname,{SONAME}", "-x", "c", "/dev/null", "-o", SONAME], work)
            run_compiler(
                [find_compiler(), *objects, *_LINK, "-Wl,--no-as-needed", f"./{SONAME}", "-Wl,--as-needed", "-o", "image.so"], work
            )
        os.replace(work / "image.so", out)
    finally:
        shutil.rmtree(work)


def only_libtorch_has(image: Path) -> list[str]:
    """Functions a model image calls that the tensor runtime does not have, sorted; where there are none it needs no libtorch.

    Raises:
        ConfigError: there is no `nm`, which comes with every linker.
    """
    nm = shutil.which(os.environ.get("NM", "nm"))
    if nm is None:
        raise ConfigError("no `nm` on PATH, which tells what a compiled image calls; install binutils or set NM")
    listed = subprocess.run([nm, "-D", "--undefined-only", str(image)], capture_output=True, text=True, check=True).stdout
    # Weak ones ("w") may stay open; one with a version ("@GLIBC_2.4") is in a library that the image names.
    wanted = [name for kind, name in (line.split()[-2:] for line in listed.splitlines()) if kind == "U" and "@" not in name]
    return lacking(wanted)


def compiler_version() -> str:
    """First line of the compiler's --version, for the manifest.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    return subprocess.run([find_compiler(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _compile(unit: _Unit, isa: str, work: Path) -> None:
    (work / f"{unit.name}.cpp").write_text(unit.source, encoding="utf-8")
    level = isa_level(isa)
    include = Path(torch.__file__).parent / "include"
    command = [
        find_compiler(), *_FLAGS, unit.opt, *_DEFINES, f"-DCPU_CAPABILITY_{level.vec_isa.upper()}", *level.gcc_flags,
        *level.vec_flags.split(), f"-ffile-prefix-map={include}=torch", "-isystem", str(include),
        "-isystem", str(include / "torch/csrc/api/include"), "-c", f"{unit.name}.cpp", "-o", f"{unit.name}.o",
    ]  # fmt: skip
    run_compiler(command, work)


def _without_paths(kernels: str) -> str:
    """Inductor's first comment names the file it wrote the wrapper to."""
    return "\n".join(line for line in kernels.splitlines() if not line.startswith("// Triton kernels are embedded")) + "\n"


def find_compiler() -> str:
    """The C++ compiler's program, $CXX or g++.

    Raises:
        ConfigError: there is none.
    """
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"no C++ compiler: {name} is not on PATH; install g++ (12 or later) or set CXX")
    return found


def run_compiler(command: list[str], work: Path) -> None:
    """Run one command of the compiler's in a folder.

    Raises:
        InternalError: it failed; with what it said.
    """
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InternalError(f"{command[0]} failed in {work}: {' '.join(command)}\n{done.stderr[-4000:]}\nplease report this model")
