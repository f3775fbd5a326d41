"""The builder: reproducible, safe with several at once, true to the level, and clear when the compiler is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from llmc.errors import ConfigError
from llmc.kernels import build
from llmc.kernels.build import build_kernels, dlopen_order
from llmc.kernels.isa import LEVELS, runnable_levels

from .paged_attention_world import kernel_cache

SMALL = ("embedding",)  # the op that compiles fastest


def disassembly(path: Path) -> str:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")
    return subprocess.run([objdump, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout


def build_in_root(arguments: tuple[Path, Path]) -> tuple[bytes, ...]:
    root, cache = arguments
    build._ROOT = root
    built = build_kernels("x86-64-v3", cache, ops=SMALL)
    return tuple(path.read_bytes() for path in (built.kernels_so, built.shim_so, built.tensor_runtime_so))


def test_same_bytes_from_two_processes_and_another_folder(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "kernels"
    shutil.copytree(build._ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    cache = tmp_path / "cache"
    jobs = [(build._ROOT, cache), (build._ROOT, cache), (copy, tmp_path / "other cache")]
    with ProcessPoolExecutor(max_workers=3) as pool:
        first, second, third = pool.map(build_in_root, jobs)
    assert first == second == third
    assert str(copy).encode() not in third[0] + third[1] and str(tmp_path).encode() not in first[0] + first[1]
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == [], "temporary folders are gone"


def test_a_damaged_build_is_made_again(tmp_path: Path) -> None:
    built = build_kernels("x86-64-v3", tmp_path, ops=SMALL)
    before = built.kernels_so.read_bytes()
    built.kernels_so.write_bytes(before[:100])
    assert build_kernels("x86-64-v3", tmp_path, ops=SMALL).kernels_so.read_bytes() == before


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_kernels("x86-64-v3", tmp_path, ops=SMALL)
    monkeypatch.setattr(build, "_build_into", lambda *arguments: pytest.fail("built again"))
    assert build_kernels("x86-64-v3", tmp_path, ops=SMALL) == built
    assert re.fullmatch("[0-9a-f]{64}", built.source_digest)


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"'no-such-compiler' not found.*apt-get install g\+\+"):
        build_kernels("x86-64-v3", tmp_path)
    with pytest.raises(ConfigError, match="known levels"):
        build_kernels("x86-64-v9", tmp_path)


def test_v3_holds_no_avx512(tmp_path_factory: pytest.TempPathFactory) -> None:
    built = build_kernels("x86-64-v3", kernel_cache(tmp_path_factory))
    for path in (built.kernels_so, built.shim_so, built.tensor_runtime_so):
        text = disassembly(path)
        assert "%ymm" in text or path == built.shim_so
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|%tmm", text)


def test_each_level_has_its_own_instructions_and_none_above(tmp_path_factory: pytest.TempPathFactory) -> None:
    uses = {"%zmm": "avx512f", "vdpbf16ps": "avx512_bf16", "tdpbf16ps": "amx_bf16"}
    for level in LEVELS.values():
        text = disassembly(build_kernels(level.name, kernel_cache(tmp_path_factory)).kernels_so)
        for instruction, feature in uses.items():
            # The AMX level multiplies by tiles alone, but may still convert with AVX512-BF16.
            if (instruction, level.name) != ("vdpbf16ps", "x86-64-v4+bf16+amx"):
                assert (instruction in text) == (feature in level.cpu_features), (level.name, instruction)


def test_kernels_need_no_torch(tmp_path_factory: pytest.TempPathFactory) -> None:
    built = build_kernels("x86-64-v3", kernel_cache(tmp_path_factory))
    for path in (built.kernels_so, built.shim_so, built.tensor_runtime_so):
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        names = set(re.findall(r"NEEDED.*\[(.+?)\]", needed))
        assert names <= {"libstdc++.so.6", "libgomp.so.1", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}


ONE_RUNTIME = """
import ctypes, json, os, sys
for path in sys.argv[1:]:
    library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
maps = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps(sorted({os.path.realpath(name) for name in maps if "gomp" in name or "iomp" in name})))
print("torch" in sys.modules)
"""


def test_a_process_holds_one_openmp_runtime(tmp_path_factory: pytest.TempPathFactory) -> None:
    built = build_kernels(runnable_levels()[0].name, kernel_cache(tmp_path_factory))
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [sys.executable, "-c", ONE_RUNTIME, *map(str, dlopen_order(built, torch_lib))]
    runtimes, torch_imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(json.loads(runtimes)) == 1, runtimes
    assert torch_imported == "False"
