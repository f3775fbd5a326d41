"""Every parameter that cannot run is refused by its own name, in a short sentence without the client's input."""

from __future__ import annotations

import math

import pytest

from llmc.errors import RequestRejected
from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampling_params import check, check_token_ids, one_of_n

LIMITS = {"vocab_size": 100, "max_logprobs": 20, "max_model_len": 64}
LONG = 10**400

BAD = [
    *[("n", value) for value in (0, -1, 129, True, 1.0)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, 1e7)],
    *[("top_p", value) for value in (0.0, -1.0, 1.1, math.nan)],
    *[("top_k", value) for value in (-2, 2**40, 1.5)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, math.nan)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, math.inf)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.5, LONG)],
    *[("max_tokens", value) for value in (0, -1, 65, LONG)],
    *[("min_tokens", value) for value in (-1, 17)],
    *[("logprobs", value) for value in (-1, 21)],
    *[("prompt_logprobs", value) for value in (-1, 21)],
    *[("stop", value) for value in ([""], ["x" * 1025], ["x"] * 17)],
    *[("stop_token_ids", value) for value in ([100], [-1], [True], ["1"], [1] * 1025)],
    *[("logit_bias", value) for value in ({100: 1.0}, {1: 101.0}, {1: math.nan})],
    *[("allowed_token_ids", value) for value in ([], [100], [1] * 101)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_refused_by_name(name, value):
    with pytest.raises(RequestRejected) as caught:
        check(SamplingParams(**{name: value}), **LIMITS)
    assert caught.value.param == name and caught.value.status == 400 and len(str(caught.value)) < 200


@pytest.mark.parametrize("words", [[[]], [[100]], [[1] * 65], [[1]] * 1025])
def test_bad_words(words):
    with pytest.raises(RequestRejected) as caught:
        check(SamplingParams(bad_words_token_ids=words), **LIMITS)
    assert caught.value.param == "bad_words"


def test_stop_strings_need_text():
    with pytest.raises(RequestRejected, match="detokenize"):
        check(SamplingParams(stop=["x"], detokenize=False), **LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 1.0},
        {"seed": -5, "max_tokens": None, "min_tokens": 64},
        {"logit_bias": {0: -100.0, 99: 100}, "allowed_token_ids": [0, 99], "stop_token_ids": [99], "bad_words_token_ids": [[99, 0]]},
        {"logprobs": 20, "prompt_logprobs": 0, "stop": ["end"]},
    ],
)
def test_accepted(fields):
    check(SamplingParams(**fields), **LIMITS)


def test_logprobs_of_the_whole_vocabulary_when_allowed():
    check(SamplingParams(logprobs=100), vocab_size=100, max_logprobs=-1, max_model_len=64)
    with pytest.raises(RequestRejected):
        check(SamplingParams(logprobs=101), vocab_size=100, max_logprobs=-1, max_model_len=64)


def test_token_ids_against_the_width_of_the_logits():
    check_token_ids([0, 99], vocab_size=100, param="prompt")
    with pytest.raises(RequestRejected, match="prompt holds 100; token ids are integers from 0 to 99"):
        check_token_ids([3, 100], vocab_size=100, param="prompt")


def test_each_of_n_draws_for_itself():
    params = SamplingParams(n=3, seed=2**63 - 1, prompt_logprobs=1)
    first, second = one_of_n(params, 0), one_of_n(params, 1)
    assert (first.n, first.seed, first.prompt_logprobs) == (1, 2**63 - 1, 1)
    assert (second.n, second.seed, second.prompt_logprobs) == (1, -(2**63), None)
    assert one_of_n(SamplingParams(n=2), 1).seed is None
    check(second, **LIMITS)
