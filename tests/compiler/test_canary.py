"""Which tokens a canary lets an artifact choose."""

from __future__ import annotations

import torch

from llmc.artifacts.manifest import Canary
from llmc.compiler.canary import MOST_CLOSE, checked_positions, close_tokens


def test_the_tokens_that_may_be_best_are_those_within_the_tolerance_of_it() -> None:
    logits = torch.tensor([1.0, 4.5, -3.0, 5.0, 4.75, 4.25])
    assert close_tokens(logits, 0.5) == [1, 3, 4]  # half of it away is within
    assert close_tokens(logits, 0.1) == [3]
    assert close_tokens(torch.zeros(MOST_CLOSE), 0.5) == list(range(MOST_CLOSE))
    assert close_tokens(torch.zeros(MOST_CLOSE + 1), 0.5) == []  # any of so many says little


def test_what_is_compared_is_counted() -> None:
    steps = [[7], [7, 8], [], [9]]
    made = Canary(prompt_token_ids=[1], expected_token_ids=[7, 7, 7, 9], margins=[2.0, 0.1, 0.0, 3.0], close_token_ids=steps)
    assert checked_positions([made, made]) == {"compared": 6, "among_close": 2, "too_close": 2}
