"""KL and friends on distributions whose divergence is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.bench.divergence import compare
from llmc.errors import InternalError


def test_equal_logits_have_none_and_a_shift_changes_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    found = compare(rows, rows)
    assert (found.mean_kl, found.max_kl, found.same_top, found.max_difference) == (0.0, 0.0, 1.0, 0.0)
    assert compare(rows, rows + np.float32(4)).mean_kl < 1e-9  # softmax does not see it
    assert compare(rows, rows + np.float32(4)).max_difference == pytest.approx(4, abs=1e-5)


def test_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = float((p * np.log(p / q)).sum())
    found = compare(np.log(np.stack([p, p])).astype(np.float32), np.log(np.stack([q, p])).astype(np.float32))
    assert found.max_kl == pytest.approx(expected, abs=1e-6)
    assert found.mean_kl == pytest.approx(expected / 2, abs=1e-6)
    assert (found.rows, found.same_top) == (2, 0.5)


def test_a_logit_the_reference_rules_out_adds_nothing_and_one_the_other_rules_out_is_infinite() -> None:
    allowed, ruled_out = np.array([[0.0, 0.0]], np.float32), np.array([[0.0, -np.inf]], np.float32)
    assert compare(ruled_out, allowed).mean_kl == pytest.approx(math.log(2))
    assert compare(allowed, ruled_out).mean_kl == math.inf


def test_other_vocabularies_are_not_compared() -> None:
    with pytest.raises(InternalError, match="shape"):
        compare(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))
