"""The input key: everything that decides an artifact's bytes, known without importing torch or reading weights twice."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from llmc.artifacts.keys import Key, model_parts, source_digest
from llmc.artifacts.keys import input_key as make_input_key
from llmc.compiler.calibration_data import LIBRARY, fitting_text, installed_version
from llmc.compiler.targets import Target
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError
from llmc.kernels.cuda_targets import CudaTarget

# Rooms whose sources decide what a compile writes; the runtime's do not.
SOURCES = ("artifacts", "compiler", "config", "kernels", "passes")
BACKENDS = {"tvm": ("apache-tvm", "apache-tvm-ffi")}  # what each backend besides Inductor brings, by its package's name
LIBRARIES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "minijinja", "jinja2")


def input_key(config: CompileConfig, target: Target) -> Key:
    """The key of what `config` asks for.

    Raises:
        ConfigError: the model folder cannot be read, or there is no C++ compiler.
    """
    parts = {
        "settings": json.dumps({**config.key_fields(), "target": target.name}, sort_keys=True),
        "model name": config.model.resolve().name,
        "llmc sources": source_digest({room: package_folder(room) for room in SOURCES}),
        **{f"version/{name}": version for name, version in toolchain(target, config.backend).items()},
        **model_parts(config.model),
    }
    if config.calibration != "rtn":
        parts[f"version/{LIBRARY}"] = installed_version()
        parts["calibration data"] = fitting_text(config.calibration_data)[1]
    if config.tokenizer is not None:
        parts |= {f"tokenizer/{name.removeprefix('model/')}": digest for name, digest in model_parts(config.tokenizer).items()}
    return make_input_key(parts)


def toolchain(target: Target | None = None, backend: str = "inductor") -> Mapping[str, str]:
    """Name -> version of what a compile runs through; for a GPU also what compiles its kernels, for another backend that one.

    Raises:
        ConfigError: a library or the compiler is missing; says how to install it.
    """
    versions = {}
    check_backend(backend)
    for name in ("llmc", *LIBRARIES, *(("triton",) if isinstance(target, CudaTarget) else ()), *BACKENDS.get(backend, ())):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed, and compiling needs it; `llmc doctor` lists what is missing") from None
    versions["c++"] = _compiler_version(os.environ.get("CXX", "g++"))
    return versions


def check_backend(backend: str) -> None:
    """Refuse a backend that is not installed.

    Raises:
        ConfigError: says what to install.
    """
    if backend == "tvm" and find_spec("tvm") is None:
        raise ConfigError("--backend tvm needs apache-tvm to compile, which is not installed; pip install 'llmc[tvm]'")


@functools.lru_cache  # one compile asks three times, and each answer is a process
def _compiler_version(compiler: str) -> str:
    path = shutil.which(compiler)
    if path is None:
        raise ConfigError(f"no C++ compiler: {compiler} is not on PATH; install g++ (Debian: apt install g++) or set CXX")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def package_folder(room: str) -> Path:
    """Where the sources of `llmc.<room>` lie."""
    spec = find_spec(f"llmc.{room}")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
