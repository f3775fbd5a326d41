"""Check and measure the GPU kernels on a machine that has a GPU; llmc need not be installed there.

    bash benchmarks/gpu_check.sh                      # every part
    bash benchmarks/gpu_check.sh kernels --only decode --out results/

Parts, each in a process of its own and runnable alone:
    parity     the tests of tests/kernels/triton on the GPU instead of in Triton's interpreter (needs pytest)
    kernels    benchmarks of every kernel against the hardware's limits and torch, one JSON file

Results are JSON, written to benchmarks/results/<device>/ or --out. The exit code is 1 if a part failed.

--stand-in goes through the same parts without a GPU: parity in Triton's interpreter; of every benchmark case the arguments are made as
fake tensors and the kernels compiled for sm_90, only not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("parity", "kernels")
LIMIT_SECONDS = 480  # per part


def overlay(folder: Path) -> Path:
    """Make `llmc` importable from a checkout: the rooms stand beside it and are its subpackages (pyproject.toml, package-dir)."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    package = folder / "llmc"
    package.mkdir()
    for entry in (ROOT / mapping.pop("llmc")).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name, room in mapping.items():
        (package / name.removeprefix("llmc.")).symlink_to(ROOT / room)
    return folder


def run_part(part: str, environment: dict[str, str], out: Path, only: str, stand_in: bool) -> dict[str, Any]:
    """Run one part and say how it ended. Its JSON, if it makes one, lies in `out`."""
    commands = {
        "parity": [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=append"),
            *("tests/kernels/triton", *(["-k", only] if only else [])),
        ],
        "kernels": [sys.executable, __file__, "--inside", "kernels", "--out", str(out), "--only", only, *["--stand-in"] * stand_in],
    }
    begin = time.monotonic()
    try:
        done = subprocess.run(commands[part], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = -1, f"{error.stdout!r}\nnot finished after {LIMIT_SECONDS} s"
    print(f"== {part}: {'ok' if code == 0 else f'failed ({code})'}\n{output}", flush=True)
    return {"part": part, "ok": code == 0, "seconds": round(time.monotonic() - begin, 1), "tail": output.splitlines()[-20:]}


def measure_kernels(out: Path, only: str, stand_in: bool) -> None:
    """Every kernel's benchmark into out/kernels.json, which is written anew after each case, so that a time limit loses little."""
    import torch

    from llmc.kernels import gpu_bench

    torch.manual_seed(0)
    machine = {"device": "none: kernels compiled, not run"} if stand_in else gpu_bench.machine()
    report: dict[str, Any] = {"benchmark": "kernels", **machine, "results": [], "failed": []}
    compiled: dict[str, dict[str, Any]] = {}
    for name in gpu_bench.BENCHES:
        module = gpu_bench.importlib.import_module(f"llmc.kernels.{name}")
        for case in module.cases():
            if only not in case.name:
                continue
            try:
                result = gpu_bench.compile_case(case, compiled) if stand_in else gpu_bench.run_case(case)
            except Exception as error:  # the other kernels are worth their numbers; the part fails below
                report["failed"].append({"case": case.name, "error": f"{type(error).__name__}: {error}"})
                print(f"{case.name}: {error}", flush=True)
            else:
                report["results"].append(result)
                print(json.dumps(result), flush=True)
            if not stand_in:
                torch.cuda.empty_cache()
            (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    if report["failed"]:
        raise SystemExit(f"{len(report['failed'])} cases failed, see {out / 'kernels.json'}")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", default="", help="tests or cases whose name holds this text")
    parser.add_argument("--stand-in", action="store_true", help="without a GPU, as far as that goes")
    parser.add_argument("--inside", choices=["kernels"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        measure_kernels(chosen.out, chosen.only, chosen.stand_in)
        return
    if unknown := set(chosen.part) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        out: Path = chosen.out or (Path(folder) if chosen.stand_in else ROOT / "benchmarks" / "results" / device_name())
        if not chosen.stand_in:
            device_name()
        out.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(overlay(Path(folder))), str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "PYTHONPATH": path,
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
