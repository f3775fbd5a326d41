"""Which sizes a configuration asks for, by the rules of tests/data/flags.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.cuda.sizes import PlanSize, plan_sizes
from llmc.errors import ConfigError

SPEC = tomllib.loads((Path(__file__).parents[1] / "data" / "flags.toml").read_text(encoding="utf-8"))


def sizes(**given: Any) -> list[PlanSize]:
    defaults = {"capture_sizes": None, "max_capture_size": None, "compile_sizes": None, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    return plan_sizes(**{**defaults, **given})


def decode(**given: Any) -> list[int]:
    return [size.num_seqs for size in sizes(**given) if size.decode]


def prefill(**given: Any) -> list[int]:
    return [size.num_tokens for size in sizes(**given) if not size.decode]


@pytest.mark.parametrize("max_num_seqs", [1, 4, 7, 64, 256, 300, 1024])
def test_defaults_follow_the_formulas_up_to_what_a_decode_step_can_have(max_num_seqs: int) -> None:
    rules = {capability["name"]: capability["formula"] for capability in SPEC["capability"] if "formula" in capability}
    largest = eval(rules["capture-max-default"], {"min": min}, {"max_num_seqs": max_num_seqs})
    formula = next(rule for rule in rules.values() if "range(8, 256, 8)" in rule)
    every = eval(formula, {"list": list, "range": range}, {"max_cudagraph_capture_size": largest})
    assert decode(max_num_seqs=max_num_seqs) == [size for size in every if size <= min(largest, max_num_seqs)]


def test_a_maximum_of_256_gives_35_sizes() -> None:
    assert len(decode()) == 35 and decode()[-1] == 256
    assert decode(max_capture_size=16) == [1, 2, 4, 8, 16]


def test_prefill_buckets_end_with_the_largest_step() -> None:
    assert prefill() == [64, 128, 256, 512, 1024, 2048]
    assert prefill(max_num_batched_tokens=300) == [64, 128, 256, 300]
    assert prefill(max_num_batched_tokens=16, max_num_seqs=4) == [16]
    assert prefill(compile_sizes=[512, 128]) == [128, 512, 2048]
    assert prefill(compile_sizes=[2048]) == [2048]


def test_a_prefill_plan_has_room_for_every_sequence() -> None:
    for size in sizes(max_num_seqs=100):
        assert size.num_seqs == size.num_logits == (size.num_tokens if size.decode else min(size.num_tokens, 100))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"capture_sizes": [1, 8], "max_capture_size": 16}, "is not the largest of --cudagraph-capture-sizes, 8"),
        ({"capture_sizes": [512]}, "above max_num_seqs=256"),
        ({"compile_sizes": [4096]}, "above max_num_batched_tokens=2048"),
        ({"compile_sizes": list(range(1, 2000))}, "an artifact may have 512 plans"),
    ],
)
def test_sizes_that_no_step_has_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sizes(**given)


def test_explicit_sizes_are_taken_once_and_in_order() -> None:
    assert decode(capture_sizes=[8, 1, 8], max_capture_size=8) == [1, 8]
