"""Medians, and intervals whose coverage is what they say."""

from __future__ import annotations

import random
import statistics

import pytest

from llmc.bench.figure import Figure, figure, percentile, ratios


@pytest.mark.parametrize(
    ("count", "low", "high", "coverage"),
    [(1, 0, 0, 0.0), (2, 0, 1, 0.5), (5, 0, 4, 0.9375), (6, 0, 5, 0.96875), (20, 5, 14, 0.958611), (30, 9, 20, 0.957226)],
)
def test_intervals_are_those_of_the_binomial_table(count: int, low: int, high: int, coverage: float) -> None:
    samples = list(range(count))
    random.Random(0).shuffle(samples)
    assert figure(samples).interval == pytest.approx((low, high, coverage), abs=1e-6)


def test_intervals_cover_the_median_as_often_as_they_say() -> None:
    """Of a skewed distribution whose median is known: ln 2 for the exponential one."""
    rng = random.Random(1)
    truth, hits, runs = 0.6931471805599453, 0, 2000
    for _ in range(runs):
        low, high, coverage = figure([rng.expovariate(1.0) for _ in range(11)]).interval
        hits += low <= truth <= high
    assert abs(hits / runs - coverage) < 4 * (coverage * (1 - coverage) / runs) ** 0.5  # four standard errors


def test_what_is_no_measurement_is_refused() -> None:
    for samples in ((), (1.0, float("nan")), (float("inf"),)):
        with pytest.raises(ValueError, match="finite samples"):
            Figure(samples)


def test_ratios_are_taken_run_by_run() -> None:
    assert ratios(figure([10, 40, 9]), figure([5, 10, 3])).samples == (2, 4, 3)
    with pytest.raises(ValueError):
        ratios(figure([1]), figure([1, 2]))


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.21, 0.5, 0.99, 1.0)] == [1, 1, 2, 3, 5, 5]
    assert percentile(values, 0.5) == statistics.median(values)
