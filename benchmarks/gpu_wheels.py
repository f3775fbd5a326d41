"""Wheels that a GPU machine without a network lacks: fetched here into a folder, installed there into one.

    python benchmarks/gpu_wheels.py DIR        # what `gpu_check.sh --pack DIR` runs

The versions are those pip finds for llmc's own requirements on CPython 3.12 and x86-64 Linux; what such a machine is known to have
(torch and what comes with it, transformers, numpy) is left out, and left out with it what nothing else needs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 64 << 20
PYTHON = "3.12"
# pip matches a tag exactly, so every glibc up to the machine's (2.39) is named.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)), "manylinux2014_x86_64", "manylinux2010_x86_64")
# On the machine already, and heavy; everything else is small enough to bring along, whether it is there or not.
PRESENT = {"torch", "triton", "transformers", "numpy", "tokenizers", "safetensors", "huggingface-hub", "jinja2", "ml-dtypes", "sympy"}
UNUSED = {"model-signing", "pyopenssl"}  # signing artifacts: nothing here signs one
TESTS = ("pytest", "pytest-xdist", "hypothesis", "httpx", "jsonschema")


def requirements() -> list[str]:
    """llmc's requirements that are brought along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line: re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in (*project["dependencies"], *TESTS)}
    return [line for line, name in names.items() if name not in PRESENT | UNUSED]


def pack(folder: Path) -> list[Path]:
    """Fetch the wheels into `folder`, which holds nothing else afterwards.

    Raises:
        SystemExit: pip fails, the folder holds something else, or the wheels are too large to be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if strange := [path.name for path in folder.iterdir() if path.suffix != ".whl"]:
        raise SystemExit(f"{folder} holds other things than wheels ({', '.join(sorted(strange)[:3])}); name an empty folder")
    found = json.loads(_pip("install", "--dry-run", "--ignore-installed", "--report", "-", "--target", str(folder), *requirements()))
    versions = {one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"] for one in found["install"]}
    for path in folder.iterdir():
        path.unlink()
    wanted = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in PRESENT]
    _pip("download", "--no-deps", "-d", str(folder), *wanted)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    if size > LIMIT_BYTES:
        largest = sorted(wheels, key=lambda path: -path.stat().st_size)[:3]
        raise SystemExit(
            f"the wheels take {size >> 20} MiB, at most {LIMIT_BYTES >> 20} can be carried; largest: {[p.name for p in largest]}"
        )
    return wheels


def install(wheels: Path, site: Path) -> None:
    """Unpack the wheels into `site`, to be put on PYTHONPATH. Needs no network.

    Raises:
        SystemExit: pip fails.
    """
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        raise SystemExit(f"{wheels} holds no wheels; make them with gpu_check.sh --pack {wheels} where there is a network")
    options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site))
    _run([sys.executable, "-m", "pip", "install", "-q", *options, *files])


def _pip(verb: str, *arguments: str) -> str:
    machine = [part for platform in PLATFORMS for part in ("--platform", platform)]
    fixed = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "-q", "--disable-pip-version-check"]
    return _run([sys.executable, "-m", "pip", verb, *fixed, *machine, *arguments])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:5])} ... failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    wheels = pack(Path(sys.argv[1]))
    print(f"{len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 2**20:.1f} MiB, in {sys.argv[1]}")


if __name__ == "__main__":
    main()
