"""Instruction-set levels a CPU artifact can be compiled for, and what each one implies.

A level is explicit everywhere: compiler flags never say `native`, so that what the builder machine happens to have
cannot leak into an artifact for another machine. `cpu:native` is only a way to *name* one of the levels.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError

from .cuda_targets import PREFIX as CUDA_PREFIX

_V3 = frozenset(  # names as in /proc/cpuinfo
    [
        "cx16",
        "lahf_lm",
        "popcnt",
        "pni",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "avx",
        "avx2",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "abm",
        "movbe",
        "xsave",
    ]  # names as in /proc/cpuinfo
)
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_V4_BF16 = _V4 | {"avx512_bf16"}
_V4_AMX = _V4_BF16 | {"amx_tile", "amx_bf16"}

# For Inductor, -mprefer-vector-width stays at GCC's default; only the vector class (simdlen) widens at v4.
_V4_INDUCTOR = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma"


@dataclass(frozen=True, kw_only=True, slots=True)
class IsaLevel:
    """One instruction-set level.

    Attributes:
        name: what the manifest calls it (`Target.isa`).
        gcc_flags: flags for g++ or clang++; complete, nothing else decides on instructions.
        cpu_features: /proc/cpuinfo flag names a machine must have to run code of this level.
        simdlen: value of Inductor's `cpp.simdlen`, bits.
        vec_isa: name of Inductor's vector class of that width ("avx2", "avx512").
        vec_flags: the arch flags that class may add, no more than the level has.
    """

    name: str
    gcc_flags: tuple[str, ...]
    cpu_features: frozenset[str]
    simdlen: int
    vec_isa: str
    vec_flags: str


LEVELS: dict[str, IsaLevel] = {
    level.name: level
    for level in (
        IsaLevel(
            name="x86-64-v3",
            gcc_flags=("-march=x86-64-v3",),
            cpu_features=_V3,
            simdlen=256,
            vec_isa="avx2",
            vec_flags="-mavx2 -mfma -mf16c",
        ),
        IsaLevel(
            name="x86-64-v4",
            gcc_flags=("-march=x86-64-v4",),
            cpu_features=_V4,
            simdlen=512,
            vec_isa="avx512",
            vec_flags=_V4_INDUCTOR,
        ),
        IsaLevel(
            name="x86-64-v4+bf16",
            gcc_flags=("-march=x86-64-v4", "-mavx512bf16"),
            cpu_features=_V4_BF16,
            simdlen=512,
            vec_isa="avx512",
            vec_flags=_V4_INDUCTOR + " -mavx512bf16",
        ),
        # AMX is for our own kernels: Inductor's pointwise code has no use for tiles, so its settings stay those of +bf16.
        IsaLevel(
            name="x86-64-v4+bf16+amx",
            gcc_flags=("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
            cpu_features=_V4_AMX,
            simdlen=512,
            vec_isa="avx512",
            vec_flags=_V4_INDUCTOR + " -mavx512bf16",
        ),
    )
}

TARGET_NAMES = ("cpu", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:native")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSpec:
    """A resolved CPU target: nothing in it says "native" or "auto" except the name people see.

    Attributes:
        name: for the manifest, "cpu:x86-64-v4" or "cpu:native(x86-64-v4+bf16)".
        kind: always "cpu".
        machine: platform.machine() the code runs on.
        level: the instruction-set level.
    """

    name: str
    kind: str
    machine: str
    level: IsaLevel

    @property
    def isa(self) -> str:
        """The level's name, as `build_kernels` takes it and the manifest stores it."""
        return self.level.name

    @property
    def cpu_features(self) -> frozenset[str]:
        """What the serving machine must have (manifest `Requirements.cpu_features`)."""
        return self.level.cpu_features


def isa_level(name: str) -> IsaLevel:
    """Look a level up by name.

    Raises:
        ConfigError: no such level.
    """
    if name not in LEVELS:
        raise ConfigError(f"instruction-set level {name!r} is unknown; known levels: {', '.join(LEVELS)}")
    return LEVELS[name]


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Flag names of this machine's first CPU; empty where the file has none (another architecture)."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def runnable_levels(features: frozenset[str] | None = None) -> list[IsaLevel]:
    """Levels whose whole feature set is present, lowest first. None asks this machine."""
    have = cpu_features() if features is None else features
    return [level for level in LEVELS.values() if level.cpu_features <= have]


def resolve_target(name: str, features: frozenset[str] | None = None) -> TargetSpec:
    """Turn a `--target` name into a level. Pure but for reading /proc/cpuinfo when the name is native.

    Args:
        name: one of TARGET_NAMES; "cpu" means "cpu:native".
        features: stands in for this machine's CPU features, for tests and for compiling on behalf of another machine.

    Raises:
        ConfigError: the name is unknown, is a CUDA target, or native was asked on a machine below x86-64-v3.
    """
    if name.startswith(CUDA_PREFIX):
        raise ConfigError(f"target {name!r} is a GPU where one of a CPU is needed: {', '.join(TARGET_NAMES)}")
    if name not in TARGET_NAMES:
        raise ConfigError(f"target {name!r} is unknown; accepted: {', '.join(TARGET_NAMES)}; `llmc compile --target list` shows all")
    if name in ("cpu", "cpu:native"):
        levels = runnable_levels(features)
        if not levels:
            have = cpu_features() if features is None else features
            missing = ", ".join(sorted(_V3 - have))
            raise ConfigError(
                f"target {name!r} needs at least x86-64-v3, but this {platform.machine()} machine lacks {missing}; "
                "name the target by its level, for example cpu:x86-64-v3"
            )
        return TargetSpec(name=f"cpu:native({levels[-1].name})", kind="cpu", machine="x86_64", level=levels[-1])
    return TargetSpec(name=name, kind="cpu", machine="x86_64", level=LEVELS[name.removeprefix("cpu:")])


def inductor_config(isa: str) -> dict[str, Any]:
    """Inductor options (for `torch._inductor.config.patch`) that pin the level. Use with `inductor_target`, which adds the rest."""
    return {"cpp.simdlen": isa_level(isa).simdlen, "cpp.vec_isa_ok": True}


@contextlib.contextmanager
def inductor_target(isa: str) -> Iterator[None]:
    """While open, Inductor generates code for `isa` and nothing above it. Mutates Inductor's module state.

    What compiles that code (`compiler/image.py`) gives the level's `gcc_flags`; Inductor's own compiler command is never run.

    The config alone does not do it: with simdlen 512 Inductor takes the first class of that width the *builder* has, which
    on an AMX machine adds -mavx512vnni and -mamx-*; and where the builder lacks AVX-512 it would fall back to scalar code.
    """
    import torch._inductor.config as inductor
    from torch._inductor import cpu_vec_isa

    level = isa_level(isa)
    base = {"avx2": cpu_vec_isa.VecAVX2, "avx512": cpu_vec_isa.VecAVX512}[level.vec_isa]

    class _Pinned(base):  # type: ignore[misc,valid-type]  # a subclass, so that isinstance checks in code generation hold
        def build_arch_flags(self) -> str:
            return level.vec_flags

        def is_avx512_bf16_supported(self) -> bool:
            return "-mavx512bf16" in level.vec_flags

        def __bool__(self) -> bool:  # the builder's CPU has no say
            return True

        __hash__ = cpu_vec_isa.VecISA.__hash__

    pinned = [_Pinned()]
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    original = cpu_vec_isa.valid_vec_isa_list
    cpu_vec_isa.valid_vec_isa_list = lambda: pinned  # type: ignore[assignment]
    try:
        with inductor.patch(inductor_config(isa)):
            yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = original
