"""The quick way through a decode step gives what the general way gives, array by array and token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmc.runtime.batch import BatchBuilder
from llmc.runtime.executors.logits import Logits, LogitsBuffer
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


def test_the_same_sequences_keep_their_batch_and_no_others_do() -> None:
    quick, general = builder(2), builder(2)
    lists = {"a": [1] * 5, "b": [2] * 9, "c": [3] * 40}
    blocks = {name: tuple([10 * index + group for index in range(20)] for group in (1, 2)) for name in lists}

    def step(names: str) -> object:
        """One more token for each of `names`; the batch, whose arrays are right."""
        for name in names:
            lists[name].append(7)
        assert_same(quick, general, [share(name, lists[name], blocks[name]) for name in names])
        assert quick._decoding is not None
        return quick._decoding.built.batch

    for names in ("abc", "ac", "bc", "cba", "abc"):  # one leaves, another stands in its place, one joins; c makes the tables wide enough
        first = step(names)
        assert step(names) is first
    blocks["b"] = tuple(list(reversed(group)) for group in blocks["b"])  # preempted, and back with other blocks
    second = step("abc")
    assert second is not first and step("abc") is second
    third = step("abc")
    assert third is not second and len(lists["c"]) % BLOCK, "the tables are wider; the next step could go on from this one"
    for name in "abc":
        lists[name].append(7)
    lists["a"][-1] = VOCAB
    assert quick.build_decode([share(name, lists[name], blocks[name]) for name in "abc"]) is None, "refused as in any other step"
    lists["a"][-1] = 7
    assert step("abc") is not third


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_batch_that_goes_on_is_the_same_in_every_array(num_groups: int) -> None:
    quick, general = builder(num_groups), builder(num_groups)
    live = {f"s{length}": ([3] * length, tuple([] for _ in range(num_groups))) for length in (30, 3, 9, 14)}
    kept, last = 0, None
    for step in range(120):
        if step % 9 == 8:
            live = {name: (tokens[:-2], blocks) for name, (tokens, blocks) in live.items()}  # guesses were wrong
        for tokens, blocks in live.values():
            tokens.append(step % VOCAB)
            while len(blocks[0]) * BLOCK < len(tokens):
                for number, group in enumerate(blocks):
                    group.append(100 * number + len(tokens))
                for group in blocks[1:]:  # a window moves on when a block is added
                    group[:-3] = [-1] * len(group[:-3])
        sequences = [share(name, tokens, blocks) for name, (tokens, blocks) in live.items()]
        assert_same(quick, general, sequences)
        assert quick._decoding is not None
        kept += quick._decoding.built is last
        last = quick._decoding.built
    assert kept > 40, "most steps go on from the one before"


def logits_of(values: np.ndarray) -> Logits:
    """As a bfloat16 program gives them."""
    return Logits((values.view(np.uint32) >> 16).astype(np.uint16), LogitsBuffer("bfloat16"))


def test_plain_tokens_are_those_of_sample() -> None:
    rng = np.random.default_rng(0)
    wants = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.0, logit_bias={4: 50.0}),
        SamplingParams(temperature=0.3, seed=-4),
        SamplingParams(temperature=1.0, seed=3, top_k=5),
        SamplingParams(temperature=1.0, seed=3, logprobs=0),
    ]
    plain_ones = {str(i) for i in range(12) if i % 6 in (0, 1, 3)}
    token_lists = [[1, 2] for _ in range(12)]
    together, alone = Sampler(eos_token_ids=[0], seed=1), Sampler(eos_token_ids=[0], seed=1)
    for step in range(70):  # further than draws are made ahead
        sequences = [
            ScheduledSequence(
                request_id=str(i), token_ids=tokens, num_prompt_tokens=1, start=len(tokens) - 1, end=len(tokens), block_ids=([0],),
                sampling=wants[i % 6], needs_prompt_logprobs=False,
            )
            for i, tokens in enumerate(token_lists)
        ]  # fmt: skip
        values = rng.standard_normal((12, 700)).astype(np.float32)
        values[6, :] = 1.0  # all equal: the first
        values[7, 5] = -np.inf
        values[3] += 500.0  # each row has a peak of its own
        broken = {"0": np.nan, "1": np.nan, "3": np.inf} if step == 40 else {}
        for name, value in broken.items():
            values[int(name), 3] = value
        expected = {s.request_id: alone.sample(row.copy(), s) for s, row in zip(sequences, logits_of(values).to_float32(), strict=True)}
        found = together.plain(sequences, logits_of(values))
        if step == 0:
            assert found == {}, "nothing is known of them before their first token"
            for s, row in zip(sequences, values, strict=True):
                together.sample(row.copy(), s)
        else:
            assert found == {name: expected[name] for name in plain_ones - broken.keys()}
        assert all((expected[name].error is None) == (name not in broken) for name in expected)
        if step == 67:
            token_lists = [tokens[:2] for tokens in token_lists]  # back to a position whose draw is not kept
        for tokens in token_lists:
            tokens.append(step)
