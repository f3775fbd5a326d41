"""What an artifact needs against what this machine has, asked before anything of it is loaded."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import dataclass

from llmc.artifacts.manifest import Requirements
from llmc.artifacts.version import FORMAT_VERSION
from llmc.errors import ArtifactError

_VERSION_LINE = re.compile(r"""^__version__\s*(?::[^=]*)?=\s*(?:version\s*=\s*)?['"](\d+\.\d+)[^'"]*['"]""", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This machine, as far as artifacts ask."""

    name: str  # platform.machine()
    cpu_features: frozenset[str]  # names as in /proc/cpuinfo
    torch: str | None  # minor version, "2.13"; None: not installed
    tvm: str | None = None  # likewise of apache-tvm


def this_machine() -> Machine:
    """Look at the machine. torch and TVM are found, not imported. Takes about a millisecond."""
    return Machine(name=platform.machine(), cpu_features=_cpu_features(), torch=installed_torch(), tvm=installed_tvm())


def installed_torch() -> str | None:
    """The minor version of the torch that `import torch` would give, read from its version file; None if there is none."""
    return _version("torch", "version.py")


def installed_tvm() -> str | None:
    """The minor version of the installed apache-tvm, read from its version file; None if there is none."""
    return _version("tvm", "_version.py")


def _version(package: str, file_name: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return None
    try:
        with open(os.path.join(os.path.dirname(spec.origin), file_name), encoding="utf-8") as file:
            found = _VERSION_LINE.search(file.read(10_000))
    except FileNotFoundError:
        return None
    return found.group(1) if found else None


def check_requirements(needs: Requirements, machine: Machine, where: str) -> None:
    """Raise ArtifactError unless the machine has everything the artifact needs; more is fine.

    Raises:
        ArtifactError: says what is needed, what is here, and what to do.
    """
    if needs.min_format > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: needs a runtime that reads format {needs.min_format}, this one reads up to {FORMAT_VERSION}; upgrade llmc"
        )
    if needs.machine != machine.name:
        raise ArtifactError(
            f"{where}: compiled for {needs.machine[:100]} processors, this machine is {machine.name}; compile again for this machine"
        )
    missing = sorted(set(needs.cpu_features) - machine.cpu_features)
    if missing:
        raise ArtifactError(
            f"{where}: needs the CPU features {', '.join(missing)[:500]}, which this CPU does not have; "
            f"compile again with --target cpu:native on this machine, or with a lower --target"
        )
    if needs.torch is not None and needs.torch != machine.torch:
        here = f"torch {machine.torch} is installed" if machine.torch else "no torch is installed"
        raise ArtifactError(
            f"{where}: its code was built against torch {needs.torch[:50]}, here {here}; install torch {needs.torch[:50]} or compile again"
        )
    if needs.tvm is not None and needs.tvm != machine.tvm:
        here = f"apache-tvm {machine.tvm} is installed" if machine.tvm else "no apache-tvm is installed"
        raise ArtifactError(
            f"{where}: it was compiled by TVM {needs.tvm[:50]} and runs over its runtime, here {here}; "
            f"pip install 'apache-tvm=={needs.tvm[:50]}.*' or compile again"
        )


def _cpu_features() -> frozenset[str]:
    """The flags of the first processor. Only its lines are read: the whole file takes 100 ms on large machines."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace", buffering=4096) as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except FileNotFoundError:
        return frozenset()  # not Linux: every required feature is then reported as missing
    return frozenset()
