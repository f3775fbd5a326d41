"""`llmc doctor`: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import rich_click as click


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `needed_for`: "compile", "serve" or "" for a remark."""

    name: str
    ok: bool
    found: str
    needed_for: str
    advice: str = ""


def python_check() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", ok, platform.python_version(), "compile and serve", "" if ok else "use Python 3.11, 3.12 or 3.13")


def package_check(name: str, low: tuple[int, int], high: tuple[int, int] | None, needed_for: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", needed_for, "pip install 'llmc[compile]'")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    ok = numbers >= low and (high is None or numbers <= high)
    wanted = f"{low[0]}.{low[1]} or later" if high is None else f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Check(name, ok, version, needed_for, "" if ok else f"llmc works with {name} {wanted}")


def compiler_check() -> Check:
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    if path is None:
        return Check("C++ compiler", False, f"{compiler} not found", "compile", "install g++ 11 or later (Debian: apt install g++)")
    version = subprocess.run([path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False).stdout.strip()
    return Check("C++ compiler", True, f"{path} {version}", "compile")


def machine_check() -> Check:
    ok = sys.platform == "linux" and platform.machine() == "x86_64"
    return Check("machine", ok, f"{sys.platform} {platform.machine()}", "compile and serve", "" if ok else "llmc runs on Linux x86-64")


def isa_check() -> Check:
    from llmc.errors import ConfigError
    from llmc.kernels.isa import resolve_target

    try:
        spec = resolve_target("cpu:native")
    except ConfigError as error:
        return Check("instruction set", False, "below x86-64-v3", "compile and serve", str(error))
    return Check("instruction set", True, spec.isa, "serve")


def huge_page_check() -> Check:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return Check("huge pages", True, "not offered by this kernel", "", "weights are read at about half the bandwidth")
    chosen = path.read_text().split("[")[1].split("]")[0]
    advice = "" if chosen != "never" else "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled doubles the read bandwidth"
    return Check("huge pages", True, chosen, "", advice)


def all_checks() -> list[Check]:
    """Every check, in the order they are shown."""
    return [
        machine_check(),
        python_check(),
        isa_check(),
        compiler_check(),
        package_check("torch", (2, 11), (2, 13), "compile"),
        package_check("transformers", (5, 17), None, "compile"),
        huge_page_check(),
    ]


@click.command("doctor")
@click.option("--for", "purpose", type=click.Choice(["compile", "serve"]), help="Check only what this takes; both, if not given.")
def doctor_command(purpose: str | None) -> int:
    """Check that this machine can compile and serve; exit status 1 when something needed is missing."""
    from rich.console import Console
    from rich.table import Table

    checks = [check for check in all_checks() if purpose is None or not check.needed_for or purpose in check.needed_for]
    table = Table(title="llmc doctor", title_justify="left")
    for column in ("", "part", "found", "needed for", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]no[/]", check.name, check.found, check.needed_for or "-", check.advice)
    Console().print(table)
    return 0 if all(check.ok for check in checks) else 1
