"""`llmc bench` on an artifact that is compiled in a second, by the commands a user types."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from llmc.bench.levels import LevelsConfig, bench_levels
from llmc.bench.machine import commit
from llmc.bench.processes import environment
from llmc.bench.result import GATE_FAILED
from llmc.cli import main
from tests.runtime.conftest import toy_folder, toy_weights  # noqa: F401
from tests.runtime.toy_artifact import write_toy_artifact

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo_model"


@pytest.fixture(scope="module")
def artifact(toy_folder: Path, toy_weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return write_toy_artifact(tmp_path_factory.mktemp("bench") / "toy", toy_folder / "toy.so", toy_weights, text=True)


def rows(path: Path, table: int = 0) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(path.read_text())["tables"][table]["rows"]
    return found


def test_the_commit_is_that_of_our_sources_alone(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "theirs").write_text("a file of theirs")
    settings = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    for arguments in (("init",), ("add", "theirs"), ("commit", "-m", "theirs")):
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert len(commit(tmp_path)) >= 7
    assert commit(tmp_path / "site-packages") == "unknown"  # installed in somebody's repository, and no part of it


def test_what_is_measured_may_keep_its_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("LLMC_KEPT", "yes")
    found = environment(OMP_NUM_THREADS="2")
    assert "PYTHONDONTWRITEBYTECODE" not in found and found["LLMC_KEPT"] == "yes" and found["OMP_NUM_THREADS"] == "2"


def test_latency_and_throughput(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    sizes = ["--input-len", "4", "--output-len", "3", "--rounds", "2", "--threads", "1", "--json", str(out)]
    assert main(["bench", "latency", str(artifact), *sizes]) == 0
    assert "first token (ms)" in capsys.readouterr().out
    (row,) = rows(out)
    assert row["engine"] == "llmc" and len(row["total"]["samples"]) == 2 and row["total"]["low"] > 0  # type: ignore[index, arg-type]
    assert main(["bench", "throughput", str(artifact), "--batch", "5", *sizes]) == 0
    (row,) = rows(out)
    assert row["total"]["median"] > row["output"]["median"] > 0  # type: ignore[index]
    assert json.loads(out.read_text())["workload"]["batch"] == 5


def test_startup_has_stages_and_a_gate(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "startup", str(artifact), "--rounds", "1", "--threads", "1", "--json", str(out)]
    assert main([*command, "--max-cold-start", "0"]) == GATE_FAILED
    assert "gate --max-cold-start 0: FAILED" in capsys.readouterr().out
    stages = {str(row["stage"]) for row in rows(out, 1)}
    assert {"total", "imports", "engine.load.weights", "engine.canary"} <= stages
    assert rows(out)[0]["pss"]["median"] > 1  # type: ignore[index]


def test_what_cannot_be_measured_is_one_sentence(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, message in (
        (["latency", str(artifact), "--input-len", "100000"], 2, "are above the artifact's"),
        (["latency", str(artifact), "--baseline", "hf"], 2, "give both, or neither"),
        (["latency", str(artifact), "--min-speedup", "2"], 2, "add --baseline hf"),
        (["latency", str(tmp_path / "nothing")], 4, "there is no such artifact"),
        (["levels", str(tmp_path), "--levels", "2,1"], 2, "in rising order"),
        (["levels", str(tmp_path), "--levels", "two"], 2, "integers with commas"),
        (["levels", str(tmp_path), "--no-startup", "--max-cold-start", "1"], 2, "leave one of them out"),
        (["levels", str(tmp_path), "--levels", "0"], 2, "-O0 does not compile"),
        (["levels", str(tmp_path), "--levels", "0,9"], 2, "--optimization-level: '9' is out of range"),
        (["levels", str(tmp_path), "--quantization", "int8,int5"], 2, "--quantization: 'int5' is not known"),
        (["levels", str(tmp_path), "--performance-mode", "fast"], 2, "--performance-mode: 'fast' is not known"),
        (["sweep", str(tmp_path), "--levels", "2,9"], 2, "--optimization-level: '9' is out of range"),
        (["sweep", str(tmp_path), "--batch", "4,4"], 2, "--batch 4,4: name each once"),
        (["latency", str(artifact), "--json", str(tmp_path / "no" / "out.json")], 2, "there is no folder "),
        (["latency", str(artifact), "--json", str(tmp_path / "o"), "--html", str(tmp_path / "o")], 2, "name two files"),
        (["latency", str(artifact), "--baseline", "hf", "--model", str(tmp_path)], 2, "cannot be read (No such file or directory)"),
        (["latency", str(artifact), "--baseline", "hf", "--model", str(DEMO)], 2, "in the artifact; name the folder that was compiled"),
        (["serve", str(artifact), "--goodput", "ttft:nan"], 2, "--goodput ttft:nan: expected milliseconds"),
    ):
        assert main(["bench", *arguments]) == status
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_levels_of_the_demo_model() -> None:
    config = LevelsConfig(model=DEMO, levels=(0, 2), baseline_hf=True, rounds=1, startup=False, max_kl=0.01, min_speedup=0.01)
    result = bench_levels(config, lambda text: None)
    oracle, best, *tvm, theirs = result.tables[0].rows
    assert (oracle["level"], best["level"], theirs["level"]) == ("-O0", "-O2", "transformers")
    if find_spec("tvm") is None:
        assert not tvm and any("pip install 'llmc[tvm]'" in note for note in result.tables[0].notes)
    else:
        assert [row["level"] for row in tvm] == ["-O2 tvm"] and tvm[0]["decode 1"].median > 0  # type: ignore[union-attr]
    assert isinstance(best["kl"], float) and best["kl"] < 0.01 and isinstance(best["same_top"], float) and best["same_top"] > 90
    assert result.exit_code == 0 and len(result.gates) == 2


def test_variants_are_compiled_with_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which compiles a command asks for; the first that fails ends it."""
    from llmc.bench import levels
    from llmc.errors import ConfigError

    asked: list[tuple[str, tuple[str, ...]]] = []

    def compile_variant(model: Path, variant: levels.Variant, out: Path) -> None:
        asked.append((variant.name, variant.options))
        if len(asked) == 4:
            raise ConfigError("enough")

    monkeypatch.setattr(levels, "compile_variant", compile_variant)
    arguments = ["--levels", "1,2", "--quantization", "int8", "--performance-mode", "throughput", "--compile-option=--dtype=float32"]
    assert main(["bench", "levels", str(tmp_path), *arguments]) == 2
    assert asked == [
        ("-O1", ("-O1", "--dtype=float32")),
        ("-O2", ("-O2", "--dtype=float32")),
        ("-O2 int8", ("-O2", "--quantization", "int8", "--dtype=float32")),
        ("-O2 throughput", ("-O2", "--performance-mode", "throughput", "--dtype=float32")),
    ]


def test_a_row_for_tvm_or_the_reason_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.bench import levels
    from llmc.errors import ConfigError

    asked: list[tuple[str, ...]] = []

    def compile_variant(model: Path, variant: levels.Variant, out: Path) -> str:
        asked.append(variant.options)
        return variant.name

    def refuse(model: Path, variant: levels.Variant, out: Path) -> None:
        raise ConfigError(f"{variant.name} does not compile: no converter to TVM for llmc.grouped_linear.default")

    def by_tvm(**settings: object) -> tuple[list[object], list[str]]:
        return levels._by_tvm(LevelsConfig(model=tmp_path, **settings), tmp_path, lambda text: None)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(levels, "compile_variant", compile_variant)
    monkeypatch.setattr(levels, "find_spec", lambda name: None)
    assert by_tvm() == ([], ["No row for TVM: apache-tvm is not installed here; pip install 'llmc[tvm]'."])
    monkeypatch.setattr(levels, "find_spec", lambda name: name)
    assert by_tvm(levels=(0, 1, 2, 3)) == (["-O2 tvm"], []) and asked == [("-O2", "--backend", "tvm")]
    assert by_tvm(tvm=False) == by_tvm(levels=(0,)) == ([], []) and len(asked) == 1
    monkeypatch.setattr(levels, "compile_variant", refuse)
    found, (note,) = by_tvm()
    assert not found and "No row for TVM: -O2 tvm does not compile" in note and "llmc.grouped_linear.default" in note


def test_rows_beside_the_levels_are_compiled_without_a_search(tmp_path: Path) -> None:
    from llmc.bench.levels import fixed_level, variants
    from llmc.errors import ConfigError

    config = LevelsConfig(model=tmp_path, levels=(1, 2, 3), quantizations=("int4",), performance_modes=("throughput",))
    assert [one.options[0] for one in variants(config)] == ["-O1", "-O2", "-O3", "-O2", "-O2"]
    assert variants(config)[3].options == ("-O2", "--quantization", "int4")
    assert fixed_level(LevelsConfig(model=tmp_path, levels=(3,))) == "-O3"
    with pytest.raises(ConfigError, match="name one of these in --levels"):
        LevelsConfig(model=tmp_path, levels=(0, 3), passes=True)


def test_performance_modes_are_measured_with_many_sequences_too(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from llmc.bench import levels

    compiled = [SimpleNamespace(manifest=SimpleNamespace(limits=SimpleNamespace(max_model_len=512)))]
    plain, beside = (LevelsConfig(model=tmp_path, performance_modes=named) for named in ((), ("interactivity",)))
    assert list(levels._modes(plain, compiled)) == ["prefill", "decode 1", "decode 8"]  # type: ignore[arg-type]
    modes = levels._modes(beside, compiled)  # type: ignore[arg-type]
    found = levels._Samples()
    timed = {"prefill_s": 0.5, "decode_tok_s": 7.0, "total_s": 4.0, "longest_step_ms": 30.0}
    found.take(modes, {name: [timed] for name in modes})
    assert found.speeds["many"] == [64 * 64 / 4.0] and found.longest_ms == [30.0] and found.speeds["decode 8"] == [7.0]


def test_each_pass_that_did_something_is_left_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from llmc.bench import levels
    from llmc.errors import ConfigError

    passes = [SimpleNamespace(name=name, matches=matches) for name, matches in (("merge-qkv", 4), ("idle", 0), ("lower-linear", 9))]
    asked, said = [], []

    def compile_variant(model: Path, variant: levels.Variant, out: Path) -> SimpleNamespace:
        asked.append(variant.options)
        if "lower-linear" in variant.name:
            raise ConfigError("the lowering needs it")
        return SimpleNamespace(name=variant.name, manifest=SimpleNamespace(passes=passes))

    monkeypatch.setattr(levels, "compile_variant", compile_variant)
    full = SimpleNamespace(name="-O2", manifest=SimpleNamespace(passes=passes))
    config = LevelsConfig(model=tmp_path, passes=True, levels=(0, 1, 2, 3))
    found = levels._without_each_pass(config, [full], tmp_path, said.append)  # type: ignore[list-item]
    assert asked == [("-O2", "--passes=-merge-qkv"), ("-O2", "--passes=-lower-linear")]
    assert [one.name for one in found] == ["-O2 -merge-qkv"]
    assert said[-1] == "lower-linear stays: the lowering needs it"
    samples = {
        name: levels._Samples(speeds={mode: [speed, speed] for mode in levels.SPEEDS})
        for name, speed in (("-O2", 3.0), ("-O2 -merge-qkv", 2.0))
    }
    apart = {name: SimpleNamespace(mean_kl=kl) for name, kl in (("-O2", 0.75), ("-O2 -merge-qkv", 0.5))}
    table = levels._pass_table(samples, levels.SPEEDS, apart, "-O2")  # type: ignore[arg-type]
    assert [(row["pass"], row["decode 1"].median, row["kl"]) for row in table.rows] == [("merge-qkv", 1.5, 0.25)]  # type: ignore[union-attr]


def compiling(process: str) -> bool:
    """Whether it is `llmc compile` itself, past its start, and not yet the copy of its parent that becomes it."""
    folder = Path("/proc") / process
    return b"\0compile\0" in (folder / "cmdline").read_bytes() and "libtorch" in (folder / "maps").read_text()


def test_a_run_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmc", "bench", "levels", str(DEMO), "--no-startup", "--no-tvm"]
    ours = {**os.environ, "TMPDIR": str(tmp_path), "LLMC_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ours) as process:
        assert process.stderr is not None and process.stderr.readline() == "llmc bench: compile -O0\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (started := children.read_text().split()) or not compiling(started[0]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("llmc-bench-*"))
    deadline = time.monotonic() + 5  # a process that was killed may take a moment to go; one that was left would compile for longer
    while left := [child for child in started if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
