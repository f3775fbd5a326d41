"""Speculative decoding gives the tokens of decoding without it, greedy and sampled, with everything that stands in the way of a guess."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

import llmc
from llmc.errors import ConfigError

if TYPE_CHECKING:
    from tests.end_to_end.workshop import Workshop

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
TIGHT: dict[str, Any] = {"threads": 1, "max_num_seqs": 6, "max_num_batched_tokens": 32, "num_blocks": 16}  # chunks and preemptions


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Half of them say everything twice, so that there is something to look up."""
    rng = random.Random(7)
    made = []
    for index in range(count):
        words = [rng.randrange(3, vocab_size) for _ in range(rng.randint(2, 12))]
        made.append(words * 3 if index % 2 else words)
    return made


def params(index: int) -> llmc.SamplingParams:
    """Greedy, sampled, penalised, masked, stopped, with log-probabilities: one after another."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "ignore_eos": True, "logprobs": 2},
        {"temperature": 0.9, "seed": index},
        {"temperature": 0.3, "seed": index, "top_k": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [5, 9, 70]},
        {"temperature": 0.5, "seed": index, "top_p": 0.8, "logit_bias": {7: 4.0, 8: 4.0}, "bad_words_token_ids": [[7, 8]]},
        {"temperature": 0.0, "allowed_token_ids": [11, 12, 13], "ignore_eos": True},
        {"temperature": 0.0, "prompt_logprobs": 1, "presence_penalty": 0.2},
    ]
    return llmc.SamplingParams(max_tokens=30, detokenize=False, **kinds[index % len(kinds)])


def outputs(artifact: Any, speculative: dict[str, Any] | None, count: int) -> tuple[list[Any], Any]:
    with llmc.LLM(artifact, speculative_config=speculative, **TIGHT) as llm:
        asked = prompts(count, llm.engine.manifest.model.vocab_size)
        found = llm.generate(asked, [params(index) for index in range(count)])
        return [(o.prompt_logprobs, o.outputs[0]) for o in found], llm.engine.stats()


def test_tokens_are_those_of_decoding_without_it(workshop: Workshop) -> None:
    artifact = workshop.artifact("qwen3")
    plain, before = outputs(artifact, None, 64)
    for speculative in (NGRAM, {"method": "ngram", "num_speculative_tokens": 1}, {**NGRAM, "num_speculative_tokens": 16}):
        guessed, stats = outputs(artifact, speculative, 64)
        assert guessed == plain  # tokens, log-probabilities to the last bit, reasons
        assert stats.spec_draft_tokens > stats.spec_accepted_tokens > 0 and stats.generation_tokens == before.generation_tokens
        assert stats.step < before.step and stats.kv_blocks_used == 0
    assert before.num_preemptions > 0 and before.spec_draft_tokens == 0


@pytest.mark.parametrize(
    ("draft", "tokens"), [("qwen3", 4), ("qwen3", 1), ("llama", 3), ("gemma3_text", 5)], ids=["itself", "one", "stranger", "windows"]
)
def test_a_draft_model_changes_no_token(workshop: Workshop, draft: str, tokens: int) -> None:
    """The model itself guesses nearly always right (but for penalties, of which a guess knows less), another one nearly never; both
    meet chunks, preemptions and a tight pool."""
    artifact = workshop.artifact("qwen3")
    plain, before = outputs(artifact, None, 48)
    guess = {"method": "draft_model", "model": str(workshop.artifact(draft)), "num_speculative_tokens": tokens}
    guessed, stats = outputs(artifact, guess, 48)
    assert guessed == plain  # tokens, log-probabilities to the last bit, reasons
    assert stats.generation_tokens == before.generation_tokens and stats.kv_blocks_used == 0 and stats.spec_draft_tokens > 100
    share = stats.spec_accepted_tokens / stats.spec_draft_tokens
    assert (share > 0.8 and stats.step < before.step) if draft == "qwen3" else share < 0.2


def test_stop_strings_end_where_they_would(workshop: Workshop) -> None:
    """A step may give tokens behind the stop string; none of them is part of the output."""
    artifact = workshop.artifact("demo", dtype=torch.bfloat16)
    texts = [
        "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
        "import os\nimport os\nimport os\nimport",
        "a b c a b c a b c a",
    ]
    asked = llmc.SamplingParams(temperature=0, max_tokens=40, stop=["return", "os\nimport os\nim", "c a"], logprobs=0)
    found = []
    draft = {"model": str(artifact), "num_speculative_tokens": 5}
    for speculative in (None, {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 1}, draft):
        with llmc.LLM(artifact, speculative_config=speculative, threads=1) as llm:
            found.append([o.outputs[0] for o in llm.generate(texts, asked)])
    assert found[0] == found[1] == found[2] and any(isinstance(o.stop_reason, str) for o in found[0])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "eagle", "num_speculative_tokens": 3}, "method 'eagle' is not built"),
        ({"num_speculative_tokens": 3}, "method None is not built"),
        ({"method": ["ngram"], "num_speculative_tokens": 3}, "is not built"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "model is ''; the folder"),
        ({"model": "draft", "num_speculative_tokens": 3, "prompt_lookup_max": 2}, "'prompt_lookup_max' is unknown for method draft_model"),
        ({"model": "draft"}, "num_speculative_tokens is missing"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "from 1 to 64"),
        ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1, "prompt_lookup_min": 2}, "is above"),
        ({"method": "ngram", "num_speculative_tokens": 3, "draft": 1}, "'draft' is unknown"),
        ({"method": "ngram", "num_speculative_tokens": True}, "from 1 to 64"),
    ],
)
def test_what_cannot_be_had_is_refused(workshop: Workshop, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        llmc.LLM(workshop.artifact("llama", level=0), speculative_config=given, **TIGHT)


def test_embeddings_have_nothing_to_guess(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match="compiled for embeddings"):
        llmc.LLM(workshop.artifact("llama", level=0, pooling="mean", normalize=True), speculative_config=NGRAM, **TIGHT)
