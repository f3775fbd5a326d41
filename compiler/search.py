"""-O3: each fusion is kept only if it pays on this model and target, measured by timing the compiled program's decode step.

    all fusions -> artifact -> time;  without the first -> artifact -> time;  slower with it: it stays out;  then the next, ...

Both programs of a comparison are timed in turns, so that a machine that slows down slows both. They are compiled as trials, without
canaries and without the cost of quantisation being measured. What is measured is kept in the stages
of the compile's report; the artifact's settings hold the choice as a value of --passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmc.compiler.pass_choice import parse_choice
from llmc.compiler.targets import Target
from llmc.errors import ConfigError
from llmc.kernels.isa import TargetSpec, cpu_features

ROUNDS = 3
# The fusions of CPU programs, in their order; compiler/pipeline.py has them by class, and a test holds the two together.
OPTIONAL = ("fuse-rms-norm", "fuse-rope-kv-write", "fuse-add-rms-norm", "fuse-silu-mul", "fuse-gelu-mul")

# Passes left out -> times of a decode step in milliseconds, each call a run of its own.
TimeStep = Callable[[frozenset[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass: medians with and without it, in milliseconds a decode step."""

    name: str
    with_ms: float
    without_ms: float

    @property
    def pays(self) -> bool:
        """Whether the step is faster with it."""
        return self.with_ms < self.without_ms

    def __str__(self) -> str:
        verdict = "" if self.pays else ", left out"
        return f"{self.name} {self.without_ms:.3g} -> {self.with_ms:.3g} ms{verdict}"


def search(optional: Sequence[str], time_step: TimeStep) -> list[Measured]:
    """Judge `optional` passes in order, each against the list as the ones before left it."""
    removed: frozenset[str] = frozenset()
    judged = []
    for name in optional:
        with_it: list[float] = []
        without: list[float] = []
        for _ in range(ROUNDS):  # of a round's runs the fastest: what else the machine does only ever adds time
            with_it.append(min(time_step(removed)))
            without.append(min(time_step(removed | {name})))
        found = Measured(name=name, with_ms=statistics.median(with_it), without_ms=statistics.median(without))
        judged.append(found)
        if not found.pays:
            removed |= {name}
    return judged


def without(passes: str, removed: frozenset[str]) -> str:
    """The value of --passes with more passes left out."""
    choice = parse_choice(passes)
    added, left_out = choice.added - removed, choice.removed | removed
    return ",".join([*(f"+{name}" for name in sorted(added)), *(f"-{name}" for name in sorted(left_out))])


def refuse_unmeasurable(target: Target, weights: str) -> None:
    """Raises ConfigError where no decode step can be timed at compile time."""
    if not isinstance(target, TargetSpec):
        raise ConfigError(f"-O3 --target {target.name}: -O3 times the program while compiling, and only CPU programs run then; use -O2")
    if missing := sorted(target.cpu_features - cpu_features()):
        raise ConfigError(f"-O3 --target {target.name}: -O3 times the program here, but this machine lacks {', '.join(missing)}; use -O2")
    if weights == "external":
        raise ConfigError("-O3 --weights external: without weights there is no decode step to time; use -O2, or --weights embed")
