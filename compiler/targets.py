"""A target by its name: a CPU level or a described GPU."""

from __future__ import annotations

from importlib.util import find_spec

from llmc.errors import ConfigError
from llmc.kernels.cuda_targets import PREFIX, CudaTarget, cuda_target
from llmc.kernels.isa import TargetSpec, resolve_target

Target = TargetSpec | CudaTarget


def find_target(name: str) -> Target:
    """Look a target up. A GPU need not be here, but what compiles for it must.

    Raises:
        ConfigError: no such target, this CPU is below every level, or triton is not installed.
    """
    if not name.startswith(PREFIX):
        return resolve_target(name)
    target = cuda_target(name)
    if find_spec("triton") is None:
        raise ConfigError(f"target {name!r} needs triton to compile, which is not installed; pip install 'llmc[cuda]'")
    return target
