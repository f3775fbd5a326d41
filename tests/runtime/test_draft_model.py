"""A draft model's books: whatever becomes of its blocks, a draft that computes what the model computes is always right.

Model and draft are the same function of all tokens they see, read back through their own KV caches. One wrong slot, table or
position in the draft's cache changes a guess, and a wrong guess is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from llmc.artifacts.kv_bytes import block_bytes
from llmc.artifacts.manifest import FileRecord, Image, Manifest, PoolingFacts, TensorRecord
from llmc.errors import ConfigError
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.engine_config import resolve
from llmc.runtime.load import LoadedModel, make_builder
from llmc.runtime.messages import GenerateRequest
from llmc.runtime.scheduler import SchedulerConfig
from llmc.runtime.scheduler.drafts import DraftModelConfig
from llmc.runtime.speculation.load import DraftModel, check_fits
from llmc.runtime.speculation.share import bytes_beside_block, draft_blocks
from llmc.runtime.step import DeviceBatch
from tests.runtime.recall_executor import RecallExecutor, request, tokens_of
from tests.runtime.toy_artifact import EOS, toy_entry, toy_kv, toy_manifest
from tests.runtime.toy_program import VOCAB


def parts(block_size: int, windows: tuple[int, ...], num_blocks: int, **limits: object) -> dict:
    """Manifest, executor, builder and limits of one model."""
    manifest = toy_manifest(kv=toy_kv(block_size, windows))
    fields: dict = {"max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 24, "reserve_blocks": 0, "num_blocks": num_blocks}
    settled = SchedulerConfig(**{**fields, "block_size": block_size, "eos_token_ids": frozenset({EOS}), **limits})
    executor = RecallExecutor(block_size, windows=windows)
    executor.allocate_kv(num_blocks)
    return {"manifest": manifest, "executor": executor, "builder": make_builder(manifest, settled), "limits": settled}


def engine_with(draft: dict | None, *, tokens: int = 4, windows: tuple[int, ...] = (0,), num_blocks: int = 40, **limits: object) -> Engine:
    """An engine, with the draft of `parts` if one is given."""
    model = None if draft is None else DraftModel(**draft, num_speculative_tokens=tokens)
    guesses = None if draft is None else DraftModelConfig(num_speculative_tokens=tokens, model="draft")
    own = parts(4, windows, num_blocks, speculation=guesses, **limits)
    return Engine(EngineConfig(artifact="none", seed=3), LoadedModel(**own, num_canary_tokens=0, startup_ms={}, draft=model))


def crowd(rng: random.Random, count: int, **sampling: object) -> list[GenerateRequest]:
    shared = [rng.randrange(3, VOCAB) for _ in range(12)]
    made = []
    for index in range(count):
        prompt = shared[: rng.choice((0, 9, 12))] + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20))]
        made.append(request(f"r{index}", prompt, max_tokens=rng.randint(1, 40), ignore_eos=True, **{"temperature": 0.0, **sampling}))
    return made


def run(engine: Engine, requests: list[GenerateRequest], rng: random.Random | None = None) -> dict[str, list[int]]:
    """Tokens of each request that was not aborted, which some are where `rng` is given; the books are recounted after every step."""
    events: dict[str, list] = {one.request_id: [] for one in requests}
    waiting = list(requests)
    while waiting or engine.has_work():
        while waiting and (rng is None or rng.random() < 0.4 or not engine.has_work()):
            engine.add(waiting.pop(0))
        if rng is not None and rng.random() < 0.05:
            victim = rng.choice(list(events))
            if engine.abort(victim):
                del events[victim]
        for event in engine.step():
            events[event.request_id].append(event)
        engine._scheduler.check()
    assert all(found[-1].finish_reason == "length" for found in events.values())
    return {key: tokens_of(found) for key, found in events.items()}


@pytest.mark.parametrize("windows", [(0,), (5,), (0, 3)], ids=["full", "window", "both"])
@pytest.mark.parametrize("seed", range(12))
def test_a_draft_that_is_the_model_is_always_right(windows: tuple[int, ...], seed: int) -> None:
    rng = random.Random(f"{seed} {windows}")
    own = {"max_num_batched_tokens": rng.choice((6, 9, 24)), "enable_prefix_caching": rng.random() < 0.7}
    draft = parts(rng.choice((2, 3, 4, 8)), windows, num_blocks=rng.choice((24, 40, 160)), **own)
    engine = engine_with(draft, tokens=rng.randint(1, 6), windows=windows, num_blocks=rng.choice((36, 60)) * len(windows))
    requests = crowd(rng, 16)
    expected = run(engine_with(None, windows=windows, num_blocks=200), requests)
    found = run(engine, requests, rng)
    assert found == {key: expected[key] for key in found}
    stats = engine.stats()
    assert stats.spec_accepted_tokens == stats.spec_draft_tokens > 0 and stats.kv_blocks_used == 0
    assert engine._drafter is not None and engine._drafter.num_held_blocks == 0


@pytest.mark.parametrize("windows", [(0,), (5,), (0, 3)], ids=["full", "window", "both"])
def test_after_a_wrong_guess_the_next_ones_are_right(windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are spoilt at random; each that stands before the first spoilt one must be what the model will say."""
    rng = random.Random(str(windows))
    requests = crowd(rng, 12)
    outputs = run(engine_with(None, windows=windows, num_blocks=400), requests)
    truth = {one.request_id: one.prompt_token_ids + outputs[one.request_id] for one in requests}
    engine = engine_with(parts(3, windows, 400), tokens=5, windows=windows, num_blocks=400)
    assert engine._drafter is not None
    guesses, propose_all = engine._sampler.guesses, engine._drafter.propose_all
    spoilt: set[tuple[str, int]] = set()

    def spoil(sequences: list, logits: np.ndarray) -> list[int]:
        found = guesses(sequences, logits)
        for index, one in enumerate(sequences):
            if rng.random() < 0.2:
                found[index] = (found[index] + 1) % VOCAB
                spoilt.add((one.request_id, len(one.token_ids)))
        return found

    def compare(sequences: list, limits: list[int]) -> list[list[int]]:
        spoilt.clear()
        proposed = propose_all(sequences, limits)
        for sequence, found in zip(sequences, proposed, strict=True):
            known = len(sequence.token_ids)
            first = next((index for index in range(len(found)) if (sequence.request_id, known + index) in spoilt), len(found))
            assert found[:first] == truth[sequence.request_id][known : known + first]
        return proposed

    monkeypatch.setattr(engine._sampler, "guesses", spoil)
    monkeypatch.setattr(engine._drafter, "propose_all", compare)
    assert run(engine, requests) == outputs
    assert 0 < engine.stats().spec_accepted_tokens < engine.stats().spec_draft_tokens


def test_draws_are_guessed_too() -> None:
    """The draft draws with the very numbers the model will draw with, so its guesses of sampled text are right as well."""
    requests = crowd(random.Random(5), 8, temperature=1.2, seed=11, top_k=20)
    requests.append(request("no seed of its own", [5, 6], max_tokens=20, ignore_eos=True))
    plain, guessed = engine_with(None, num_blocks=200), engine_with(parts(4, (0,), 160), num_blocks=200)
    assert run(guessed, requests) == run(plain, requests)
    stats = guessed.stats()
    assert stats.spec_accepted_tokens == stats.spec_draft_tokens > 50 and stats.step < plain.stats().step


def test_a_wrong_draft_and_one_too_short_change_nothing() -> None:
    requests = crowd(random.Random(9), 10)
    plain = run(engine_with(None, num_blocks=200), requests)
    stranger, short = engine_with(parts(4, (3,), 60)), engine_with(parts(4, (0,), 60, max_model_len=24))
    assert run(stranger, requests) == run(short, requests) == plain
    assert 0 < stranger.stats().spec_accepted_tokens + 1 < stranger.stats().spec_draft_tokens
    assert 0 < short.stats().spec_draft_tokens < 30 * len(requests)


def test_a_draft_that_fails_ends_what_runs_and_the_engine_goes_on() -> None:
    draft = parts(4, (0,), 60)
    draft["executor"].explode = 7
    engine = engine_with(draft)
    engine.add(request("a", [3, 4, 7], max_tokens=9, temperature=0.0, ignore_eos=True))
    events = [event for _ in range(3) if engine.has_work() for event in engine.step()]
    assert events[-1].finish_reason == "error" and "the kernel failed" in (events[-1].error or "")
    assert engine._drafter is not None and engine._drafter.num_held_blocks == 0
    draft["executor"].explode = -1
    assert run(engine, crowd(random.Random(1), 4)) == run(engine_with(None), crowd(random.Random(1), 4))
    engine.close()
    assert draft["executor"].closed


def test_the_drafts_cache_holds_as_many_tokens() -> None:
    kv, draft = toy_kv(4, (0,)), toy_kv(3, (0, 5))
    assert draft_blocks(30, kv, draft) == 80 and draft_blocks(1, kv, draft) == 3 and draft_blocks(1, toy_kv(1, (0,)), toy_kv(8, (0,))) == 2
    assert bytes_beside_block(kv, kv) == block_bytes(kv)
    assert bytes_beside_block(kv, draft) == -(-block_bytes(draft) * 4 * 2 // 3)


def test_memory_is_shared_between_the_two_caches() -> None:
    """A budget of bytes holds the model's blocks and the draft's; without a draft it holds more of the model's."""
    manifest, draft = toy_manifest(kv=toy_kv(4, (0,))), toy_manifest(kv=toy_kv(2, (0, 3)))
    budget = 40 * block_bytes(manifest.kv)
    config = EngineConfig(artifact="none", kv_cache_memory_bytes=budget, max_model_len=64)
    alone, both = (resolve(config, manifest, available_bytes=0, draft=one).num_blocks for one in (None, draft))
    needed = both * block_bytes(manifest.kv) + draft_blocks(both, manifest.kv, draft.kv) * block_bytes(draft.kv)
    assert alone == 40 and budget - block_bytes(manifest.kv) * 5 < needed <= budget


def test_tenants_share_no_prefix_in_the_drafts_cache() -> None:
    prompt, computed = list(range(3, 27)), []
    for salt in ("", "another tenant"):
        draft = parts(4, (0,), 160)
        engine = engine_with(draft)
        run(engine, [request("first", prompt, max_tokens=6, temperature=0.0, ignore_eos=True)])
        executor, own = draft["executor"], 0
        inner = executor.run

        def count(batch: DeviceBatch, inner: Callable[[DeviceBatch], np.ndarray] = inner) -> np.ndarray:
            nonlocal own
            own += len(batch.input_ids)
            return inner(batch)

        executor.run = count
        again = request("second", prompt, max_tokens=6, temperature=0.0, ignore_eos=True)
        run(engine, [msgspec.structs.replace(again, cache_salt=salt)])
        computed.append(own)
    assert computed[1] - computed[0] >= 20  # the prompt's full blocks


def _digest(letter: str) -> str:
    return letter * 64


def _with_files(letter: str) -> Manifest:
    """A manifest whose tokenizer and kernels have hashes of `letter`."""
    tokenizer = msgspec.structs.replace(toy_manifest().tokenizer, tokenizer_json="tokenizer/tokenizer.json")
    return toy_manifest(
        tokenizer=tokenizer,
        files=[FileRecord(path="tokenizer/tokenizer.json", size_bytes=1, sha256=_digest(letter))],
        images=[Image(sha256=_digest(letter), path="images/k.so", role="kernels")],
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": msgspec.structs.replace(toy_manifest().model, vocab_size=VOCAB + 1)}, "a vocabulary of .* the model of"),
        ({"tokenizer": toy_manifest().tokenizer}, "the tokenizer of draft/ is not the model's"),
        ({"files": _with_files("b").files}, "the tokenizer of draft/ is not the model's"),
        ({"images": _with_files("b").images}, "brings other kernels than the model"),
        ({"pooling": PoolingFacts(kind="mean", normalize=True)}, "compiled for embeddings"),
        ({"entries": [toy_entry(executor="plans")]}, "compiled for a GPU"),
        ({"tensors": [TensorRecord(name="w", dtype="float32", shape=[1], file=None, offset=0, nbytes=4, recipe={})]}, "weights external"),
    ],
    ids=["vocabulary", "no tokenizer", "tokenizer", "kernels", "embeddings", "gpu", "external"],
)
def test_a_draft_that_does_not_fit_is_refused(changes: dict, match: str) -> None:
    manifest = _with_files("a")
    check_fits(manifest, _with_files("a"), "draft/")
    with pytest.raises(ConfigError, match=match):
        check_fits(manifest, msgspec.structs.replace(manifest, **changes), "draft/")
