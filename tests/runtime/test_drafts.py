"""Guesses by prompt lookup: what they are, and what is kept for them."""

from __future__ import annotations

import random

import pytest

from llmc.errors import ConfigError
from llmc.runtime.scheduler.drafts import NgramDrafter, SpeculationConfig, speculation_config


def drafter(tokens: int = 4, longest: int = 5, shortest: int = 2) -> NgramDrafter:
    return NgramDrafter(SpeculationConfig(num_speculative_tokens=tokens, prompt_lookup_max=longest, prompt_lookup_min=shortest))


def test_what_followed_last_time_is_guessed_again() -> None:
    assert drafter().propose("a", [1, 2, 3, 4, 5, 6, 7, 1, 2], 9) == [3, 4, 5, 6]
    assert drafter().propose("a", [1, 2, 3, 4, 5, 6, 7, 1, 2], 2) == [3, 4]
    assert drafter().propose("a", [1, 2, 3, 4, 5, 6, 7, 1, 9], 9) == []
    assert drafter(shortest=1).propose("a", [1, 2, 3, 1], 9) == [2, 3, 1]
    for short in ([], [1], [1, 1]):
        assert drafter().propose("a", short, 9) == []


def test_the_longest_agreement_wins_then_the_most_recent() -> None:
    longer_first = [7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2]
    assert drafter(tokens=1).propose("a", longer_first, 9) == [30]
    assert drafter(tokens=1, longest=2).propose("a", longer_first, 9) == [40]


def test_growing_by_steps_is_the_same_as_at_once() -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(4) for _ in range(300)]
    kept = drafter(shortest=1)
    for end in sorted(rng.sample(range(1, 301), 120)):
        assert kept.propose("a", tokens[:end], 4) == drafter(shortest=1).propose("a", tokens[:end], 4)


def test_sequences_are_apart_and_forgotten() -> None:
    kept = drafter(shortest=1)
    kept.propose("a", [1, 2, 3, 1], 4)
    assert kept.propose("b", [5, 1], 4) == []
    assert kept.check({"a", "b"}) and not kept.check({"a"})
    kept.forget("b")
    kept.forget("b")
    assert kept.check({"a"})


def test_defaults_and_limits() -> None:
    assert speculation_config({"method": "ngram", "num_speculative_tokens": 3}) == SpeculationConfig(num_speculative_tokens=3)
    only_max = speculation_config({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1})
    assert (only_max.prompt_lookup_max, only_max.prompt_lookup_min) == (1, 1)
    for name, value in (("num_speculative_tokens", 65), ("prompt_lookup_max", 33), ("prompt_lookup_min", 0), ("prompt_lookup_max", 2.0)):
        with pytest.raises(ConfigError, match=name):
            speculation_config({"method": "ngram", "num_speculative_tokens": 3, name: value})
