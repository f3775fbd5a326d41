"""The quick way through a decode step gives what the general way gives, array by array and token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmc.runtime.batch import BatchBuilder
from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import ScheduledSequence

VOCAB, BLOCK = 50, 4


def builder(num_groups: int) -> BatchBuilder:
    return BatchBuilder(
        block_size=BLOCK, num_groups=num_groups, vocab_size=VOCAB, max_num_batched_tokens=64, max_num_seqs=16, max_model_len=200
    )


def share(name: str, tokens: list[int], blocks: tuple[list[int], ...], **fields: object) -> ScheduledSequence:
    known = {"start": len(tokens) - 1, "end": len(tokens), "needs_prompt_logprobs": False, "num_prompt_tokens": 1} | fields
    return ScheduledSequence(request_id=name, token_ids=tokens, block_ids=blocks, sampling=SamplingParams(temperature=0.0), **known)  # type: ignore[arg-type]


def assert_same(quick: BatchBuilder, general: BatchBuilder, sequences: list[ScheduledSequence]) -> None:
    found = quick.build_decode(sequences)
    assert found is not None
    for sequence in sequences:
        general.check(sequence)
    expected = general.build(sequences)
    assert found.rows == expected.rows
    for name in ("input_ids", "positions", "logits_indices", "slot_mapping", "block_tables", "seq_lens", "query_start_loc"):
        left, right = getattr(found.batch, name), getattr(expected.batch, name)
        assert left.dtype == right.dtype and left.flags.c_contiguous
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_every_array_is_the_same_while_sequences_come_grow_move_and_leave(num_groups: int) -> None:
    rng = random.Random(num_groups)
    quick, general = builder(num_groups), builder(num_groups)
    live: dict[str, tuple[list[int], tuple[list[int], ...]]] = {}
    for step in range(400):
        if len(live) < 12 and rng.random() < 0.3:
            live[f"s{step}"] = ([rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))], tuple([] for _ in range(num_groups)))
        for name, (tokens, blocks) in list(live.items()):
            if len(tokens) > 100 or rng.random() < 0.02:
                del live[name]
                continue
            if rng.random() < 0.02:
                for group in blocks:
                    group.clear()  # preempted: other blocks in the same lists, after a step without it
                continue
            tokens.append(rng.randrange(VOCAB))
            grew = len(blocks[0]) * BLOCK < len(tokens)
            while len(blocks[0]) * BLOCK < len(tokens):
                for group in blocks:
                    group.append(rng.randrange(1000))
            if grew and num_groups == 2:  # a window moves on when a block is added
                blocks[1][: len(blocks[1]) - 2] = [-1] * (len(blocks[1]) - 2)
        sequences = [share(name, tokens, blocks) for name, (tokens, blocks) in live.items() if blocks[0]]
        if not sequences:
            continue
        if rng.random() < 0.1:
            quick.build(sequences)  # a step of the other kind writes over the same memory
        assert_same(quick, general, sequences)


@pytest.mark.parametrize(
    "odd",
    [
        share("a", [1, 2, 3], ([5],), start=0),  # more than one token
        share("a", [1, 2, 3], ([5],), start=1, end=2),  # goes on later
        share("a", [1, 2, 3], ([5],), needs_prompt_logprobs=True),
        share("a", [1, 2, VOCAB], ([5],)),
        share("a", [1, 2, -1], ([5],)),
        share("a", [1] * 5, ([5],)),  # too few blocks
        share("a", [1] * 5, ([5, -1],)),  # a block it gave back
        share("a", [1], ([5], [6])),  # another number of groups
        share("a", [1], ([5],), start=-1),
    ],
)
def test_any_other_step_is_left_to_the_general_way(odd: ScheduledSequence) -> None:
    plain = share("b", [1, 2], ([7],))
    assert builder(1).build_decode([plain, odd]) is None
    assert builder(1).build_decode([plain]) is not None


def test_plain_tokens_are_those_of_sample() -> None:
    rng = np.random.default_rng(0)
    tokens = [1, 2]
    wants = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.0, logit_bias={4: 50.0}),
    ]
    sequences = [
        ScheduledSequence(
            request_id=str(i), token_ids=tokens, num_prompt_tokens=1, start=1, end=2, block_ids=([0],), sampling=wants[i % 3],
            needs_prompt_logprobs=False,
        )
        for i in range(9)
    ]  # fmt: skip
    logits = rng.standard_normal((9, VOCAB)).astype(np.float32)
    logits[3] = np.nan
    logits[6, :] = 1.0  # all equal: the first
    rows = builder(1).build_decode(sequences)
    assert rows is not None
    sampler = Sampler(eos_token_ids=[0], seed=1)
    assert sampler.plain(sequences, rows.rows, logits) == {}, "nothing is known of them before their first token"
    expected = {s.request_id: sampler.sample(row.copy(), s) for s, row in zip(sequences, logits, strict=True)}
    found = sampler.plain(sequences, rows.rows, logits)
    assert found == {name: expected[name] for name in ("0", "6")}
    assert expected["3"].error is not None
