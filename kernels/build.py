"""Compile the C++ kernels for one instruction-set level, once per set of sources, flags and compiler.

Three shared objects come out:
    kernels         every kernels/<op>/cpu/<op>.cpp; C entry points, knows nothing of torch, needs libstdc++ and libgomp only
    shim            every kernels/<op>/cpu/<op>_shim.cpp; the aoti_torch_cpu_llmc_* functions that AOTInductor code calls
    tensor_runtime  the shim's functions again, and kernels/aoti_runtime/: what they and the code call of libtorch, without libtorch

An artifact takes the shim, which then runs over libtorch, or the tensor runtime.

The shim names neither libtorch nor the kernels in its DT_NEEDED: the loader resolves aoti_torch_* from libtorch_cpu and llmc_*
from the kernels, so both must have been opened with RTLD_GLOBAL before it (`dlopen_order`).

OpenMP: a process must hold one OpenMP runtime, or two thread pools fight for the cores. torch brings its own copy under the soname
libgomp.so.1, the same name that the kernels ask for, and the loader takes an already loaded library of that name. Hence the
order: libtorch_cpu first, then kernels, then the shim.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from llmc.errors import ConfigError, InternalError

from .aoti_runtime import SONAME
from .isa import isa_level

_ROOT = Path(__file__).parent
_KERNELS_NAME, _SHIM_NAME, _RECORD_NAME = "libllmc_kernels.so", "libllmc_aoti_shim.so", "built.json"
_NAMES = (_KERNELS_NAME, _SHIM_NAME, SONAME)
# -ffp-contract=off: a fused multiply-add appears where the source asks for one, so that bits do not hang on the optimiser's mood.
_COMPILE_FLAGS = (
    "-O3", "-std=c++20", "-fopenmp", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-fno-math-errno", "-Wall", "-Wextra", "-Werror=return-type", "-Wno-unused-parameter", "-Wno-psabi",
)  # fmt: skip
_LINK_FLAGS = ("-shared", "-fopenmp", "-s", "-Wl,--build-id=none", "-Wl,--as-needed", "-Wl,-z,relro,-z,now")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltKernels:
    """The shared objects, and what they were made from.

    Attributes:
        kernels_so, shim_so, tensor_runtime_so: files in the builder's cache; copy them, never move them.
        source_digest: SHA-256 (hex) over the kernel sources and headers alone, the same on every machine.
        compiler: first line of the compiler's --version.
    """

    kernels_so: Path
    shim_so: Path
    tensor_runtime_so: Path
    source_digest: str
    compiler: str


def build_kernels(isa: str, cache_dir: Path, jobs: int = 1, ops: Sequence[str] | None = None) -> BuiltKernels:
    """Build, or find in the cache, the kernels for a level. Safe with several processes at once.

    Args:
        isa: a level's name (`kernels.isa.LEVELS`).
        cache_dir: where builds are kept, one folder per key; made if missing.
        jobs: compilers to run at the same time.
        ops: folders of `kernels/` to take; None takes all, which is what an artifact gets.

    Raises:
        ConfigError: unknown level, no C++ compiler, or one that cannot compile for the level.
    """
    level = isa_level(isa)
    compiler, compiler_version = _find_compiler()
    sources = _sources(ops)
    digest = kernel_source_digest()
    flags = [*_COMPILE_FLAGS, *level.gcc_flags]
    key_parts = {
        "sources": digest, "compiled": sources, "flags": flags, "link": list(_LINK_FLAGS), "compiler": compiler_version,
        "torch": version("torch"),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()[:32]
    cache_dir.mkdir(parents=True, exist_ok=True)
    final = cache_dir / f"{isa}-{key}"
    if not _is_whole(final):
        if final.exists():
            shutil.rmtree(final, ignore_errors=True)  # damaged: another process may be removing it too
        _build_into(final, compiler, flags, sources, jobs)
    kernels_so, shim_so, tensor_runtime_so = (final / name for name in _NAMES)
    return BuiltKernels(
        kernels_so=kernels_so, shim_so=shim_so, tensor_runtime_so=tensor_runtime_so, source_digest=digest, compiler=compiler_version
    )


def kernel_source_digest() -> str:
    """SHA-256 (hex) over relative names and bytes of every kernel source and header."""
    digest = hashlib.sha256()
    for path in _all_source_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def dlopen_order(built: BuiltKernels, torch_lib: Path | None) -> list[Path]:
    """Files to open with RTLD_NOW | RTLD_GLOBAL, in this order. torch_lib is torch's `lib` folder; None: the tensor runtime for it."""
    if torch_lib is None:
        return [built.kernels_so, built.tensor_runtime_so]
    return [torch_lib / "libtorch_cpu.so", built.kernels_so, built.shim_so]


def _all_source_files() -> list[Path]:
    headers = [*_ROOT.glob("*.h"), *_ROOT.glob("*/cpu/*.h"), *_ROOT.glob("aoti_runtime/*.h")]
    return sorted([*headers, *_ROOT.glob("*/cpu/*.cpp"), *_ROOT.glob("aoti_runtime/*.cpp")])


def _sources(ops: Sequence[str] | None) -> tuple[list[str], list[str], list[str]]:
    """(kernel sources, shim sources, tensor sources), relative to the room, sorted so that link order is fixed."""
    names = sorted(path.relative_to(_ROOT).as_posix() for path in _ROOT.glob("*/cpu/*.cpp"))
    if ops is not None:
        names = [name for name in names if name.split("/")[0] in ops]
    tensors = sorted(path.relative_to(_ROOT).as_posix() for path in _ROOT.glob("aoti_runtime/*.cpp"))
    return [n for n in names if not n.endswith("_shim.cpp")], [n for n in names if n.endswith("_shim.cpp")], tensors


def _find_compiler() -> tuple[str, str]:
    """(program, first line of its --version). Honours $CXX, as Inductor does, so that one compiler builds the whole artifact."""
    name = os.environ.get("CXX") or "g++"
    program = shutil.which(name)
    if program is None:
        raise ConfigError(
            f"C++ compiler {name!r} not found; kernels are compiled for the target at compile time: install g++ 12 or newer "
            "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX to one"
        )
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.strip():
        raise ConfigError(f"C++ compiler {program} does not answer --version (exit code {answer.returncode}); set CXX to a working g++")
    return program, answer.stdout.splitlines()[0].strip()


def _torch_include() -> Path:
    """torch's header folder, found without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError("torch is not installed; the AOTInductor shim needs its headers: pip install torch")
    return Path(spec.origin).parent / "include"


def _build_into(final: Path, compiler: str, flags: list[str], sources: tuple[list[str], list[str], list[str]], jobs: int) -> None:
    """Compile into a temporary folder beside `final`, then rename it there; the first process to finish wins."""
    include = _torch_include()
    # Sources are named relative to the room (cwd), torch's headers are mapped to a fixed name: no path reaches the object.
    common = [*flags, "-I.", f"-ffile-prefix-map={_ROOT}=kernels", f"-ffile-prefix-map={include}=torch"]
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=final.parent))
    try:
        out = work / "out"
        out.mkdir()

        def compile_one(name: str) -> str:
            extra = [f"-isystem{include}"] if name.endswith("_shim.cpp") else []
            # The object's name must not depend on the temporary folder: it is relative to where the linker runs.
            obj = name.replace("/", "_") + ".o"
            _run([compiler, *common, *extra, "-c", name, "-o", str(work / obj)], cwd=_ROOT)
            return obj

        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            kernels, shim, tensors = [list(pool.map(compile_one, group)) for group in sources]
        for group, name in zip((kernels, shim, [*shim, *tensors]), _NAMES, strict=True):
            _run([compiler, *_LINK_FLAGS, f"-Wl,-soname,{name}", *group, "-o", f"out/{name}"], cwd=work)
        record = {name: _sha256(out / name) for name in _NAMES}
        (out / _RECORD_NAME).write_text(json.dumps(record, sort_keys=True))
        for path in out.iterdir():
            _fsync(path)
        try:
            os.rename(out, final)
        except OSError:
            if not _is_whole(final):  # not the harmless case of another process having finished first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str], cwd: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = done.stderr.strip()[-2000:]
    if "unrecognized command" in said or "bad value" in said or "unsupported argument" in said:
        raise ConfigError(f"{command[0]} cannot compile for this instruction-set level, g++ 12 or newer can: {said}")
    raise InternalError(f"kernel build failed (exit code {done.returncode}); please report it. Command: {' '.join(command)}\n{said}")


def _is_whole(folder: Path) -> bool:
    """Whether a cached build has its files with the bytes it was finished with."""
    try:
        record = json.loads((folder / _RECORD_NAME).read_text())
        return all(record.get(name) == _sha256(folder / name) for name in _NAMES)
    except (FileNotFoundError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
