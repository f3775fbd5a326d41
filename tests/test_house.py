"""The house rules that a test can hold: who imports whom, and that every package is in the wheel."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("artifacts", "kernels", "passes", "compiler", "runtime")
# docs/architecture.md, "Rooms". llmc.errors and llmc.config are open to every room.
MAY_IMPORT = {
    "artifacts": set(),
    "kernels": set(),
    "passes": {"kernels"},
    "compiler": {"passes", "kernels", "artifacts"},
    "runtime": {"artifacts"},
    "llmc": set(),  # errors.py and config/
}
FREE = ("llmc.errors", "llmc.config")


def python_files(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> set[str]:
    """Every module name imported in a file, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).parent.parts
                package = parts if parts[0] == "llmc" else ("llmc", *parts)
                module = ".".join((*package[: len(package) - node.level + 1], *filter(None, [module])))
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_the_map_allows(room: str) -> None:
    wrong = []
    for path in python_files(room):
        part = path.relative_to(ROOT / room).parts[0]
        if room == "llmc" and part not in ("errors.py", "config"):
            continue  # the public API and the command line may use every room
        allowed = tuple(f"llmc.{name}" for name in MAY_IMPORT[room] | {room}) if room != "llmc" else ()
        for name in imports(path):
            if name.startswith("llmc.") and not name.startswith((*FREE, *allowed)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["runtime", "artifacts"])
def test_the_runtime_never_imports_the_toolchain(room: str) -> None:
    forbidden = ("transformers", "torch._dynamo", "torch._inductor", "sympy", "triton")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}" for path in python_files(room) for name in imports(path) if name.startswith(forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_node_executor_imports_torch() -> None:
    users = {str(path.relative_to(ROOT)) for path in python_files("runtime") if any(n.split(".")[0] == "torch" for n in imports(path))}
    assert users <= {"runtime/executors/nodes.py"}


def test_no_pickle_anywhere() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "torch.load", "joblib"}
    wrong = [f"{p.relative_to(ROOT)}: {n}" for room in (*ROOMS, "llmc") for p in python_files(room) for n in imports(p) & forbidden]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_listed_in_pyproject() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for room in (*ROOMS, "llmc"):
        for init in (ROOT / room).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if room == "llmc" else ("llmc", *parts)))
    assert listed == found


def test_files_stay_readable() -> None:
    """About 400 lines hold one idea; a longer file has a reason, named here."""
    reasons = {"llmc/config/settings.py": "one table"}
    long = {
        str(p.relative_to(ROOT)): n for room in (*ROOMS, "llmc") for p in python_files(room) if (n := len(p.read_text().splitlines())) > 450
    }
    assert not set(long) - set(reasons), long
