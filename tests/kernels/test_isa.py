"""Targets resolve to levels, and levels hold Inductor to what they have."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llmc.errors import ConfigError
from llmc.kernels.isa import LEVELS, IsaLevel, cpu_features, inductor_config, inductor_target, isa_level, resolve_target, runnable_levels


def test_levels_grow() -> None:
    features = [level.cpu_features for level in LEVELS.values()]
    assert all(low < high for low, high in itertools.pairwise(features))
    assert not any("native" in " ".join(level.gcc_flags) for level in LEVELS.values())


@pytest.mark.parametrize("name", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
def test_a_named_level_does_not_ask_this_machine(name: str) -> None:
    target = resolve_target(name, features=frozenset())
    assert (target.name, target.isa, target.machine) == (name, name.removeprefix("cpu:"), "x86_64")
    assert target.cpu_features == LEVELS[target.isa].cpu_features


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_native_is_the_best_whole_level(level: IsaLevel) -> None:
    target = resolve_target("cpu", features=level.cpu_features | {"fpu"})
    assert target.isa == level.name and target.name == f"cpu:native({level.name})"
    assert resolve_target("cpu:native", features=level.cpu_features) == target


def test_half_a_level_does_not_count() -> None:
    features = LEVELS["x86-64-v4"].cpu_features - {"avx512vl"} | {"avx512_bf16", "amx_tile", "amx_bf16"}
    assert [level.name for level in runnable_levels(features)] == ["x86-64-v3"]


def test_an_old_machine_is_told_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="lacks .*avx2.*cpu:x86-64-v3"):
        resolve_target("cpu", features=frozenset({"sse4_2"}))


@pytest.mark.parametrize("name", ["native", "cpu:x86-64-v5", "gpu", ""])
def test_unknown_targets_and_levels_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="accepted: cpu, cpu:x86-64-v3, cpu:x86-64-v4, cpu:native"):
        resolve_target(name)
    with pytest.raises(ConfigError, match="known levels"):
        isa_level(name)


def test_features_come_from_the_flags_line(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_features(cpuinfo) == {"fpu", "avx2", "fma"}
    assert cpu_features(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_inductor_sees_one_vector_class(level: IsaLevel) -> None:
    from torch._inductor import cpu_vec_isa

    before = cpu_vec_isa.valid_vec_isa_list
    with inductor_target(level.name):
        isa = cpu_vec_isa.pick_vec_isa()
        flags = isa.build_arch_flags()
        assert isa.bit_width() == level.simdlen and str(isa) == level.vec_isa
        assert "native" not in flags and "amx" not in flags and "vnni" not in flags
        assert ("avx512" in flags) == (level.simdlen == 512) and ("bf16" in flags) == ("bf16" in level.name)
    assert cpu_vec_isa.valid_vec_isa_list is before
    assert inductor_config(level.name)["cpp.simdlen"] == level.simdlen
