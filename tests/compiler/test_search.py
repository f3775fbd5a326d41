"""-O3: what the search keeps, by times that are made up; where it refuses; and that it knows the pipeline's fusions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmc.compiler import driver
from llmc.compiler.driver import compile_model
from llmc.compiler.pipeline import pipeline
from llmc.compiler.search import FEWEST_ROUNDS, LOST, OPTIONAL, refuse_unmeasurable, search, without
from llmc.compiler.stages import Silent, StageLog
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError
from llmc.kernels.isa import resolve_target

SAVES_MS = {"fuse-rms-norm": 2.0, "fuse-rope-kv-write": 0.25, "fuse-add-rms-norm": -1.0, "fuse-silu-mul": 0.5, "fuse-gelu-mul": 0.0}


def test_the_search_knows_the_fusions_of_the_pipeline() -> None:
    assert list(OPTIONAL) == [p.name for p in pipeline(2) if p not in pipeline(1)]


def test_passes_that_do_not_pay_are_left_out() -> None:
    asked: list[frozenset[str]] = []

    def time_step(removed: frozenset[str]) -> list[float]:
        asked.append(removed)
        return [10.0 - sum(ms for name, ms in SAVES_MS.items() if name not in removed)] * 2

    judged = search(OPTIONAL, time_step)
    assert [found.name for found in judged if not found.pays] == ["fuse-add-rms-norm", "fuse-gelu-mul"]
    assert len(asked) == 2 * (3 * FEWEST_ROUNDS + 2 * LOST), "rounds end when it is decided"
    assert asked[-1] == {"fuse-add-rms-norm", "fuse-gelu-mul"}, "each is judged beside those that were kept"
    assert str(judged[0]) == "fuse-rms-norm 10.2 -> 8.25 ms"
    assert str(judged[2]).endswith("ms, left out")


@pytest.mark.parametrize(
    ("with_it", "pays", "says"),
    [
        ([1.0, 50.0, 1.0], True, "2 -> 1 ms"),  # a slow second moves no median
        ([3.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0], False, "2 -> 3 ms, left out"),
        ([3.0, 3.0, 1.0, 3.0, 3.0, 1.0], True, "2 -> 3 ms, no clear difference, kept"),
    ],
)
def test_rounds_that_say_different_things(with_it: list[float], pays: bool, says: str) -> None:
    times = iter(with_it)
    (found,) = search(["fuse-silu-mul"], lambda removed: [2.0 if removed else next(times)])
    assert (found.pays, str(found)) == (pays, f"fuse-silu-mul {says}")
    assert next(times, None) is None


def test_programs_are_timed_as_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[CompileConfig] = []

    def compile_trial(config: CompileConfig, **_: object) -> None:
        asked.append(config)
        config.out.mkdir()
        (config.out / "manifest.json").write_text('{"passes": [{"name": "fuse-silu-mul", "matches": 2}]}')

    monkeypatch.setattr(driver, "compile_model", compile_trial)
    config = CompileConfig(
        model=tmp_path, out=tmp_path / "out", level=3, quantization="int4", calibration="awq", calibration_data=tmp_path, max_kl=0.1
    )
    chosen = driver._searched(config, StageLog(Silent()), None, None, lambda folder: [2.0 if folder.name == "all" else 1.0])
    assert [(one.level, one.passes, one.trial, one.calibration, one.max_kl) for one in asked] == [
        (2, "", True, "rtn", None),
        (2, "-fuse-silu-mul", True, "rtn", None),
    ]
    assert chosen == dataclasses.replace(config, passes="-fuse-silu-mul"), "nothing else of what was asked for changes"


def test_a_choice_of_the_user_stays() -> None:
    removed = frozenset({"fuse-silu-mul"})
    assert without("", removed) == "-fuse-silu-mul"
    assert without("-merge-qkv,+fuse-silu-mul", removed) == "-fuse-silu-mul,-merge-qkv"
    assert without("+merge-qkv", frozenset()) == "+merge-qkv"


def test_refused_where_nothing_can_be_timed() -> None:
    target = resolve_target("cpu")
    refuse_unmeasurable(target, "embed")
    with pytest.raises(ConfigError, match="-O3 --weights external: without weights"):
        refuse_unmeasurable(target, "external")
    level = dataclasses.replace(target.level, cpu_features=target.cpu_features | {"avx1024"})
    with pytest.raises(ConfigError, match="but this machine lacks avx1024; use -O2"):
        refuse_unmeasurable(dataclasses.replace(target, level=level), "embed")


def test_the_library_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="-O3 times programs"):
        compile_model(CompileConfig(model=tmp_path, level=3, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
