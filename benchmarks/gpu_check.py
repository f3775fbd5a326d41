"""Check and measure llmc on a machine that has a GPU; llmc need not be installed there.

    bash benchmarks/gpu_check.sh                      # every part
    bash benchmarks/gpu_check.sh kernels --only decode --out results/
    bash benchmarks/gpu_check.sh --pack .whl          # where there is a network: the wheels that a GPU machine without one lacks
    bash benchmarks/gpu_check.sh --wheels .whl        # on that machine

Parts, each in a process of its own, at most 8 minutes, and runnable alone:
    tests        the tests marked `gpu`
    parity       tests/kernels/triton on the GPU instead of in Triton's interpreter; in 8 processes where pytest-xdist is installed
    prepare      checkpoints of the 0.6B and 8B shapes and their artifacts, which the next three parts make where it did not
    startup      process start to first token of the 0.6B and 8B shapes, stage by stage; transformers with torch.compile beside it
    decode       tokens per second by batch and context, as a share of the measured copy bandwidth; transformers beside it
    throughput   256 sequences of 100 to 1024 tokens in and out
    kernels      every kernel against the vendor's limits and torch
    tuning       tiles of the matmul that change no bit of a result

Results are JSON, written to benchmarks/results/<device>/ or --out: a file per part with versions, clocks, commit and the ceilings measured
in the same process, written anew after every figure or test, and gpu_check.json: how each part ended, and how much of it was run. A part
past its time is stopped with all it started, and what it has found by then stays. The exit code is 1 if a part failed.
LLMC_BENCH_DIR keeps checkpoints and artifacts between runs; LLMC_COMMIT names the commit where the tree has no git.

--stand-in goes through every part without a GPU: plans run on the stand-in driver of tests/cuda, kernels in Triton's interpreter;
benchmarks of kernels only compile them for sm_90. gpu_check.json says of each part what that leaves untried.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_wheels

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "parity", "prepare", "startup", "decode", "throughput", "kernels", "tuning")
LIMIT_SECONDS = 480  # per part
NO_TESTS = 5  # pytest's exit status when it selected nothing
PARITY_PROCESSES = 8  # most of the time goes to Triton, which compiles in one thread

# What a part does on the stand-in, for gpu_check.json.
UNTRIED = {
    "tests": "tests/cuda on the stand-in driver; what is marked gpu is skipped",
    "parity": "kernels in Triton's interpreter: their machine code is not run",
    "prepare": "a model of 2 layers is compiled",
    "startup": "a model of 2 layers served on the stand-in driver: no time means anything; transformers is not run",
    "decode": "a model of 2 layers on the stand-in driver: no rate means anything; transformers is not run",
    "throughput": "4 short sequences through a model of 2 layers on the stand-in driver: no rate means anything",
    "kernels": "kernels are compiled for sm_90, spills checked, and not run",
    "tuning": "tiles are compiled for sm_90 for one matrix, and not timed",
}


def overlay(folder: Path) -> Path:
    """Make `llmc` importable from a checkout: the rooms stand beside it and are its subpackages (pyproject.toml, package-dir).

    A dist-info stands beside it, so that its version can be asked for as if it were installed.
    """
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping = described["tool"]["setuptools"]["package-dir"]
    package = folder / "llmc"
    package.mkdir()
    for entry in (ROOT / mapping.pop("llmc")).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name, room in mapping.items():
        (package / name.removeprefix("llmc.")).symlink_to(ROOT / room)
    version = described["project"].get("version", "0")
    information = folder / f"llmc-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llmc\nVersion: {version}\n")
    return folder


def command_of(part: str, out: Path, only: str, stand_in: bool, processes: bool) -> list[str]:
    """What does a part's work; processes: whether tests can be run in several."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_outcomes", "--import-mode=append"]
    pytest += ["-k", only] if only else []
    if part == "tests":
        return [
            *pytest,
            *(["tests/cuda", "-m", "not slow and not gpu"] if stand_in else ["tests", "-m", "gpu", "--ignore=tests/kernels/triton"]),
        ]
    if part == "parity":
        return [*pytest, "tests/kernels/triton", *(["-n", str(PARITY_PROCESSES)] if processes else [])]
    worker = str(ROOT / "benchmarks" / "gpu_parts.py")
    return [sys.executable, worker, part, str(out), only, "stand-in" if stand_in else "gpu"]


def run_part(part: str, environment: dict[str, str], out: Path, only: str, stand_in: bool) -> dict[str, Any]:
    """Run one part and say how it ended. Its own JSON, if it makes one, lies in `out`."""
    begin = time.monotonic()
    ran, why = ("partly", UNTRIED[part]) if stand_in else ("whole", "")
    named = {"GPU_CHECK_JSON": str(out / f"{part}.json")} | ({"GPU_CHECK_STAND_IN": "1"} if stand_in else {})
    command = command_of(part, out, only, stand_in, processes=not stand_in and _has_xdist(environment))
    code, output = run_limited(command, environment | named, LIMIT_SECONDS)
    if code is None:
        code, ran, why = -1, "partly", f"stopped after {LIMIT_SECONDS} s"
    if part == "tests" and code == NO_TESTS:
        code, ran, why = 0, "no", "no test was selected"
    own = out / f"{part}.json"
    if part not in ("tests", "parity") and own.is_file() and (left_out := json.loads(own.read_text()).get("left_out")):
        ran, why = "partly", "; ".join(filter(None, [why, *(f"{one['case']}: {one['why']}" for one in left_out)]))
    print(f"== {part}: {'ok' if code == 0 else f'failed ({code})'}, {ran} run{f' ({why})' if why else ''}\n{output}", flush=True)
    seconds = round(time.monotonic() - begin, 1)
    return {"part": part, "ok": code == 0, "ran": ran, "why": why, "seconds": seconds, "tail": output.splitlines()[-20:]}


def run_limited(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a command; after `seconds` it is killed with all that it started, which would else hold the GPU. Returns (status, output).

    The status is None if it was killed.
    """
    with tempfile.TemporaryFile("w+") as shown:  # not a pipe, which somebody who outlives the command would keep open
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=shown, stderr=shown, text=True, start_new_session=True)
        code: int | None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shown.seek(0)
        return code, shown.read()


def _has_xdist(environment: dict[str, str]) -> bool:
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('xdist') is None)"
    return subprocess.run([sys.executable, "-c", find], env=environment, check=False).returncode == 0


def device_name() -> str:
    """A folder's name for this GPU, e.g. h200.

    Raises:
        SystemExit: there is none, or torch is missing.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit("gpu_check needs a CUDA build of torch and triton; torch is not installed") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu_check needs an NVIDIA GPU and a CUDA build of torch; torch {torch.__version__} sees no GPU on this machine")
    words = torch.cuda.get_device_name().lower().split()
    return next((w for w in words if any(c.isdigit() for c in w)), "-".join(words))


def check_parts(parts: list[str], stand_in: bool) -> None:
    """Refuse parts that cannot be run here, before any is.

    Raises:
        SystemExit: with the reason.
    """
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not stand_in:
        device_name()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("gpu_check needs triton, also with --stand-in, which compiles and interprets kernels: pip install 'llmc[cuda]'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="tests or cases whose name holds this text")
    parser.add_argument("--stand-in", action="store_true", help="without a GPU, as far as that goes")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="fetch wheels into DIR and do nothing else")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use the wheels of --pack, without a network")
    chosen = parser.parse_args()
    if chosen.pack:
        wheels = gpu_wheels.pack(chosen.pack)
        print(f"{len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 2**20:.1f} MiB, in {chosen.pack}")
        return
    check_parts(chosen.part, chosen.stand_in)
    with tempfile.TemporaryDirectory() as folder:
        out: Path = chosen.out or (Path(folder) if chosen.stand_in else ROOT / "benchmarks" / "results" / device_name())
        out.mkdir(parents=True, exist_ok=True)
        paths = [str(overlay(Path(folder))), str(ROOT)]
        if chosen.wheels:
            gpu_wheels.install(chosen.wheels, Path(folder) / "site")
            paths.insert(1, str(Path(folder) / "site"))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # else the checkout's own llmc/, which lacks the rooms, would be found first
            "LLMC_TRITON_TESTS": "1",
        }
        ended = []
        for part in chosen.part or PARTS:
            interpreter = {"TRITON_INTERPRET": "1"} if chosen.stand_in and part == "parity" else {}
            ended.append(run_part(part, environment | interpreter, out.resolve(), chosen.only, chosen.stand_in))
            (out / "gpu_check.json").write_text(json.dumps(ended, indent=1) + "\n")
    if not all(e["ok"] for e in ended):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
