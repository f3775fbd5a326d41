"""The wheel holds every source and data file of every room, and works without the source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("artifacts", "compiler", "kernels", "passes", "runtime")
SHIPPED = (".py", ".cpp", ".h", ".toml", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # from a copy of what git tracks: building writes into the tree
    tree = out / "tree"
    tree.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("llmc-*.whl")
    return built


def test_every_source_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *ROOMS, "llmc"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name if name.startswith("llmc/") else f"llmc/{name}" for name in tracked if name.endswith(SHIPPED)}
    assert not wanted - held


def test_it_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = "import llmc.cli, llmc.compiler.driver, llmc.kernels.build as b; print(llmc.__file__, b.kernel_source_digest())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    helped = subprocess.run(
        [sys.executable, "-m", "llmc", "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert helped.returncode == 0 and b"compile" in helped.stdout
