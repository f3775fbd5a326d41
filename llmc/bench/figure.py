"""A measured quantity: its samples, their median, and an interval that says how well the median is known.

The interval is the one of order statistics: of n independent samples, the k-th smallest and k-th largest enclose the median with a
probability that the binomial distribution gives, whatever the samples' own distribution. Fewer than six samples cannot reach 95 %;
their range is given then, with its true coverage.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Figure:
    """Samples of one quantity, in the order taken; at least one, all finite."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not all(math.isfinite(value) for value in self.samples):
            raise ValueError(f"a figure needs finite samples, found {self.samples!r}")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float, float]:
        """(low, high, probability that they enclose the true median)."""
        ordered = sorted(self.samples)
        rank, coverage = _rank(len(ordered))
        return ordered[rank], ordered[-1 - rank], coverage

    def as_json(self) -> dict[str, object]:
        """median, low, high, coverage, samples."""
        low, high, coverage = self.interval
        return {"median": self.median, "low": low, "high": high, "coverage": round(coverage, 4), "samples": list(self.samples)}


def figure(values: Sequence[float]) -> Figure:
    """The figure of some samples."""
    return Figure(tuple(float(value) for value in values))


def ratios(numerators: Figure, denominators: Figure) -> Figure:
    """Sample by sample, for runs that alternated: what slowed both down cancels.

    Raises:
        ValueError: not as many of one as of the other.
    """
    return Figure(tuple(a / b for a, b in zip(numerators.samples, denominators.samples, strict=True)))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` (0 to 1) of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _rank(count: int) -> tuple[int, float]:
    """The largest k whose interval [k-th smallest, k-th largest], counted from 0, reaches the confidence, and its coverage."""
    best = (0, _coverage(count, 0))
    for rank in range(1, (count - 1) // 2 + 1):
        coverage = _coverage(count, rank)
        if coverage < CONFIDENCE:
            break
        best = (rank, coverage)
    return best


def _coverage(count: int, rank: int) -> float:
    outside = sum(math.comb(count, k) for k in range(rank + 1))
    return max(0.0, 1.0 - 2.0 * outside / 2**count)


def number(value: float, digits: int) -> str:
    """Fixed digits; of small values that would show as zero, two that are not."""
    return f"{value:.2g}" if value and abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"
