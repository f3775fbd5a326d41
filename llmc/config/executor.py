"""What runs an artifact's program, where --executor names it: the target and level decide, and another is refused with the reason."""

from __future__ import annotations

from llmc.errors import ConfigError

EXECUTORS = ("auto", "nodes", "aoti", "plan")


def check_executor(executor: str, *, target: str, level: int, backend: str) -> None:
    """Refuse an executor that no program of this target and level has.

    Args:
        executor: one of EXECUTORS; "auto" is never refused.

    Raises:
        ConfigError: with the one to name instead.
    """
    gpu, asked = target.startswith("cuda:"), f"--executor {executor} --target {target} -O{level}"
    if executor == "plan" and not gpu:
        raise ConfigError(f"{asked}: a plan is a schedule of a GPU's kernels; a CPU has nodes at -O0 and aoti above")
    if executor == "aoti" and gpu:
        raise ConfigError(
            f"{asked}: AOTInductor runs a GPU's kernels once to compile for it, so its package cannot be made without that GPU, and torch "
            "would have to be installed to serve it; every supported architecture has plans, and what a plan cannot hold is refused by "
            "name when it is compiled: leave the flag out"
        )
    if executor == "nodes" and level > 0:
        raise ConfigError(f"{asked}: nodes run one by one at -O0 alone, the oracle; leave the flag out, or use -O0 --target cpu")
    if executor == "aoti" and level == 0:
        raise ConfigError(f"{asked}: -O0 compiles nothing, its nodes run one by one; use -O1 or -O2")
    if executor == "aoti" and backend != "inductor":
        raise ConfigError(f"{asked}: AOTInductor's programs are Inductor's, not those of --backend {backend}; leave one of them out")
