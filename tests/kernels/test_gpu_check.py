"""benchmarks/gpu_check.sh: runs from a plain checkout, says what is missing, and goes through its parts without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_wheels
from benchmarks.gpu_check import PARTS, UNTRIED, overlay, run_limited
from benchmarks.gpu_parts import PARTS as WORKERS
from benchmarks.gpu_parts import step_bytes

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_rooms_are_one_package_without_an_installation(tmp_path: Path) -> None:
    code = "import llmc.errors, llmc.kernels; print(llmc.kernels.__file__)"
    command = [sys.executable, "-S", "-P", "-c", code]  # -S: nothing that is installed can be seen; -P: nor the checkout
    found = subprocess.run(command, env={"PYTHONPATH": str(overlay(tmp_path))}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "llmc" / "kernels" / "__init__.py")


def test_llmc_has_a_version_without_an_installation(tmp_path: Path) -> None:
    code = "from importlib.metadata import version; print(version('llmc'))"
    command = [sys.executable, "-S", "-P", "-c", code]
    found = subprocess.run(command, env={"PYTHONPATH": str(overlay(tmp_path))}, capture_output=True, text=True, check=True)
    assert f'version = "{found.stdout.strip()}"' in (ROOT / "pyproject.toml").read_text()


def test_every_part_says_what_the_stand_in_leaves_untried() -> None:
    assert set(UNTRIED) == set(PARTS) == {"tests", "parity", *WORKERS}


def test_what_is_carried_is_light() -> None:
    names = {line.split(">")[0].split("=")[0].split(";")[0].strip() for line in gpu_wheels.requirements()}
    assert {"msgspec", "uvicorn", "pyzmq", "orjson", "minijinja", "llguidance", "rich-click", "pydantic", "pytest"} <= names
    assert not names & (gpu_wheels.PRESENT | gpu_wheels.UNUSED)


def test_wheels_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no wheels; make them with gpu_check.sh --pack"):
        gpu_wheels.install(tmp_path, tmp_path / "site")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other things than wheels"):
        gpu_wheels.pack(tmp_path)


def test_a_step_reads_every_weight_and_all_keys_and_values() -> None:
    assert abs(step_bytes("0.6B", 1, 0) / 2 / 596_049_920 - 1) < 1e-3  # the model's parameters but for its norms
    assert step_bytes("0.6B", 2, 100) - step_bytes("0.6B", 1, 100) == 100 * 2 * 28 * 8 * 128 * 2


def _state_of(pid: str) -> str:
    """The letter in /proc/PID/stat; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_part_past_its_time_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    """Its grandchild is gone too, and what was said until then is kept."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    code, output = run_limited([sys.executable, "-u", "-c", f"{child} print('found', p.pid); time.sleep(600)"], dict(os.environ), 3)
    assert code is None and output.startswith("found ")
    for _ in range(500):  # killed, but perhaps not dead yet
        if _state_of(output.split()[1]) in ("", "Z"):
            break
        time.sleep(0.02)
    else:
        pytest.fail("what the part started still runs")
    assert run_limited([sys.executable, "-c", "print('done'); raise SystemExit(3)"], dict(os.environ), 60) == (3, "done\n")


def test_tests_leave_their_outcomes_as_they_end(tmp_path: Path) -> None:
    """A run that dies in the middle has written what came before."""
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0, 'why'\n"
        "@pytest.mark.skip(reason='because')\ndef test_c(): pass\n"
        "def test_d(): time.sleep(2.1)\n"
        "def test_e(): os._exit(9)\n"
    )
    out = tmp_path / "parity.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_outcomes", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {"GPU_CHECK_JSON": str(out), "GPU_CHECK_STAND_IN": "1", "PYTHONPATH": str(ROOT)}
    code, _ = run_limited(command, {**os.environ, **environment}, 120)
    found = json.loads(out.read_text())
    assert code == 9 and found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert "why" in found["failed"][0]["error"] and found["skipped"] == {"Skipped: because": 1}


def test_says_that_a_gpu_is_missing() -> None:
    done = gpu_check("kernels")
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check needs an NVIDIA GPU") and len(done.stderr.splitlines()) == 1


def test_an_unknown_part_is_refused() -> None:
    assert "no part is called everything; there are tests, parity" in gpu_check("everything").stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'llmc[cuda]')")
@pytest.mark.parametrize("only", ["argmax 1x", pytest.param("", marks=pytest.mark.slow)])
def test_the_stand_in_compiles_what_would_be_measured(tmp_path: Path, only: str) -> None:
    done = gpu_check("kernels", "--stand-in", "--only", only, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["failed"] == [] and len(report["results"]) >= 1
    assert report["machine"]["device"] == "none: stand-in"
    assert all(case["launches"] for case in report["results"])
    (ended,) = json.loads((tmp_path / "gpu_check.json").read_text())
    assert ended["ok"] and ended["ran"] == "partly" and "not run" in ended["why"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'llmc[cuda]')")
@pytest.mark.parametrize("part", ["prepare", "startup", "decode", "throughput"])
def test_a_model_goes_through_the_stand_in(tmp_path: Path, part: str) -> None:
    done = gpu_check(part, "--stand-in", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / f"{part}.json").read_text())["results"]
    figures = {"prepare": "compile_s", "startup": "first_token_s", "decode": "decode_tok_s", "throughput": "tok_s"}
    assert result[figures[part]]
