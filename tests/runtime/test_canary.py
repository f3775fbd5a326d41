"""Canaries run side by side where they fit, each on blocks of its own, and every position that must agree is compared."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
import pytest

from llmc.artifacts.manifest import Canary, Manifest
from llmc.errors import ArtifactError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.canary import run_canaries
from llmc.runtime.executors.logits import Logits
from llmc.runtime.step import DeviceBatch, Executor

VOCAB, BLOCK, GROUPS = 50, 4, 2


def following(token: int) -> int:
    return (7 * token + 3) % VOCAB


class Recorder:
    """Answers every token with `following` it, and keeps what each step was."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.slots: list[np.ndarray] = []

    def run(self, batch: DeviceBatch) -> Logits:
        self.tokens.append(np.diff(batch.query_start_loc).tolist())
        self.slots.append(batch.slot_mapping.copy())
        logits = np.zeros((len(batch.logits_indices), VOCAB), dtype=np.float32)
        logits[np.arange(len(logits)), [following(int(t)) for t in batch.input_ids[batch.logits_indices]]] = 1
        return Logits(logits)


def canary(prompt_tokens: int, new_tokens: int, first: int = 1) -> Canary:
    tokens = [first]
    while len(tokens) < prompt_tokens + new_tokens:
        tokens.append(following(tokens[-1]))
    margins = [1.0] * (new_tokens - 1) + [0.001]  # the last one is too close to call
    return Canary(prompt_token_ids=tokens[:prompt_tokens], expected_token_ids=tokens[prompt_tokens:], margins=margins)


def manifest(*canaries: Canary) -> Manifest:
    class Facts(msgspec.Struct):
        canaries: list[Canary]
        kv: Any
        canary_tolerance: float = 0.01

    class KV(msgspec.Struct):
        block_size: int
        groups: list[int]

    return cast(Manifest, Facts(canaries=list(canaries), kv=KV(block_size=BLOCK, groups=list(range(GROUPS)))))


def run(canaries: list[Canary], *, max_tokens: int = 100, max_seqs: int = 8, num_blocks: int = 100) -> tuple[int, Recorder]:
    executor = Recorder()
    builder = BatchBuilder(
        block_size=BLOCK, num_groups=GROUPS, vocab_size=VOCAB, max_num_batched_tokens=max_tokens, max_num_seqs=max_seqs, max_model_len=64
    )
    limits = {"max_tokens": max_tokens, "max_seqs": max_seqs, "num_blocks": num_blocks}
    return run_canaries(manifest(*canaries), cast(Executor, executor), builder, **limits), executor


def test_two_canaries_take_two_steps_on_blocks_of_their_own() -> None:
    compared, executor = run([canary(6, 4), canary(3, 5, first=9)])
    assert compared == 3 + 4
    assert executor.tokens == [[8, 6], [1, 1]]
    written = np.concatenate([slots.reshape(-1) for slots in executor.slots])
    assert len(set(written.tolist())) == len(written) == GROUPS * (8 + 6 + 2)
    assert set((written // BLOCK).tolist()) == set(range(GROUPS * (3 + 2)))


@pytest.mark.parametrize("limit", [{"max_tokens": 13}, {"max_seqs": 1}, {"num_blocks": 9}])
def test_what_does_not_fit_beside_another_runs_after_it(limit: dict[str, int]) -> None:
    compared, executor = run([canary(6, 4), canary(3, 5, first=9)], **limit)
    assert compared == 7 and executor.tokens == [[8], [1], [6], [1]]


def test_a_long_one_runs_in_chunks_and_one_without_room_not_at_all() -> None:
    compared, executor = run([canary(6, 4), canary(3, 3)], max_tokens=5, num_blocks=6)
    assert compared == 3 + 2 and executor.tokens == [[5], [3], [1], [4], [1]]
    assert run([canary(6, 4), canary(3, 3)], num_blocks=5)[0] == 2
    assert run([canary(1, 1)])[0] == 0  # its only token is too close to call


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("token", [0, 2])
def test_another_token_is_told_with_its_canary_and_place(number: int, token: int) -> None:
    canaries = [canary(6, 4), canary(3, 5, first=9)]
    canaries[number].expected_token_ids[token] = 0 if canaries[number].expected_token_ids[token] else 1
    with pytest.raises(ArtifactError, match=rf"canary {number}: token {token} is"):
        run(canaries)


@pytest.mark.parametrize("broken", [{"margins": []}, {"close_token_ids": [[1]]}, {"expected_token_ids": []}])
def test_a_canary_without_margins_is_refused(broken: dict[str, Any]) -> None:
    wrong = msgspec.structs.replace(canary(3, 3), **broken)
    with pytest.raises(ArtifactError, match="canary 1 has no prompt, no tokens or not one margin and list of close tokens per token"):
        run([canary(3, 3), wrong])


def test_where_several_tokens_come_as_close_the_artifact_chooses_one_of_them() -> None:
    one = canary(6, 3)
    own = [[token] for token in one.expected_token_ids]
    others = [[token - 1, token] if token else [token, token + 1] for token in one.expected_token_ids]
    for close, compared in ((own, 3), (others, 3), ([own[0], [], others[2]], 2)):
        assert run([msgspec.structs.replace(one, close_token_ids=close)])[0] == compared
    wrong = [own[0], own[1], [(one.expected_token_ids[2] + step) % VOCAB for step in (1, 2)]]  # its margin is under the tolerance
    with pytest.raises(ArtifactError, match=r"token 2 is \d+ where the reference gave \d+ \(margin 0.001, 1 more within 0.01 of it\)"):
        run([msgspec.structs.replace(one, close_token_ids=wrong)])
