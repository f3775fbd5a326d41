"""-O3: a fusion that does not pay on this model and target is left out, measured by timing the compiled program's decode step.

    all fusions -> artifact -> time;  without the first -> artifact -> time;  slower with it: it stays out;  then the next, ...

Both programs of a comparison are timed in turns, round by round, so that a machine that slows down slows both. One round says little on
a machine that has other work: a fusion is left out if it was not faster in LOST of ROUNDS rounds, so that one that makes no difference
stays 15 times of 16, and rounds end when that is decided. Programs are compiled as trials, without canaries and without the cost of
quantisation being measured. What is measured is kept in the stages of the compile's report; the artifact's settings hold the choice as a
value of --passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmc.compiler.pass_choice import parse_choice
from llmc.compiler.targets import Target
from llmc.errors import ConfigError
from llmc.kernels.isa import TargetSpec, cpu_features

ROUNDS, LOST = 7, 6
FEWEST_ROUNDS = 3  # for a median worth showing
# The fusions of CPU programs, in their order; compiler/pipeline.py has them by class, and a test holds the two together.
OPTIONAL = ("fuse-rms-norm", "fuse-rope-kv-write", "fuse-add-rms-norm", "fuse-silu-mul", "fuse-gelu-mul")

# Passes left out -> times of a decode step in milliseconds, each call a run of its own.
TimeStep = Callable[[frozenset[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass: medians with and without it, in milliseconds a decode step, and in how many rounds the step was faster with it."""

    name: str
    with_ms: float
    without_ms: float
    faster_rounds: int

    @property
    def pays(self) -> bool:
        """Whether it stays."""
        return self.faster_rounds > ROUNDS - LOST

    def __str__(self) -> str:
        verdict = ", left out" if not self.pays else "" if self.with_ms < self.without_ms else ", no clear difference, kept"
        return f"{self.name} {self.without_ms:.3g} -> {self.with_ms:.3g} ms{verdict}"


def search(optional: Sequence[str], time_step: TimeStep) -> list[Measured]:
    """Judge `optional` passes in order, each against the list as the ones before left it."""
    removed: frozenset[str] = frozenset()
    judged = []
    for name in optional:
        with_it: list[float] = []
        without: list[float] = []
        faster = 0
        while len(with_it) < FEWEST_ROUNDS or (faster <= ROUNDS - LOST and len(with_it) - faster < LOST):
            with_it.append(min(time_step(removed)))  # of a round's runs the fastest: what else the machine does only ever adds time
            without.append(min(time_step(removed | {name})))
            faster += with_it[-1] < without[-1]
        found = Measured(name=name, with_ms=statistics.median(with_it), without_ms=statistics.median(without), faster_rounds=faster)
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
