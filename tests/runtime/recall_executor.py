"""An executor that remembers through its KV cache, so that any mistake in slots, tables or positions changes what it says."""

from __future__ import annotations

import numpy as np

from llmc.runtime.batch import BatchBuilder
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.executors.logits import Logits
from llmc.runtime.load import LoadedModel, make_builder
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent
from llmc.runtime.scheduler import SchedulerConfig
from llmc.runtime.step import DeviceBatch
from tests.runtime.toy_artifact import EOS, toy_kv, toy_manifest
from tests.runtime.toy_program import VOCAB


class RecallExecutor:
    """Logits are a fixed random function of all tokens the attention would see, read back through the block tables.

    `poison`: a token id whose row comes out as NaN. `explode`: a token id that makes the whole step fail.
    """

    def __init__(self, block_size: int, *, windows: tuple[int, ...] = (0,), poison: int = -1, explode: int = -1) -> None:
        self.block_size, self.windows, self.poison, self.explode = block_size, windows, poison, explode
        self.num_steps = 0
        self.closed = False

    def allocate_kv(self, num_blocks: int) -> None:
        self.cache = np.full((len(self.windows), num_blocks * self.block_size), -1, dtype=np.int64)

    def run(self, batch: DeviceBatch) -> Logits:
        self.num_steps += 1
        if self.explode in batch.input_ids:
            raise RuntimeError("the kernel failed")
        for group in range(len(self.windows)):
            self.cache[group, batch.slot_mapping[group]] = batch.input_ids
        logits = np.empty((len(batch.logits_indices), VOCAB), dtype=np.float32)
        for index, row in enumerate(batch.logits_indices):
            sequence = int(np.searchsorted(batch.query_start_loc, row, side="right")) - 1
            assert batch.query_start_loc[sequence + 1] - 1 - row + batch.positions[row] == batch.seq_lens[sequence] - 1
            seen = tuple(
                self._seen(group, batch.block_tables[group, sequence], int(batch.positions[row])) for group in range(len(self.windows))
            )
            logits[index] = np.random.default_rng(abs(hash(seen))).normal(size=VOCAB) * 2
            if batch.input_ids[row] == self.poison:
                logits[index, 5] = np.nan
        return Logits(logits)

    def _seen(self, group: int, table: np.ndarray, position: int) -> tuple[int, ...]:
        window = self.windows[group]
        first = max(0, position + 1 - window) if window else 0
        positions = np.arange(first, position + 1)
        tokens = self.cache[group, table[positions // self.block_size] * self.block_size + positions % self.block_size]
        assert (tokens >= 0).all(), "a slot was read that nobody wrote"
        return tuple(int(token) for token in tokens)

    def close(self) -> None:
        self.closed = True


def recall_engine(
    *, num_blocks: int = 64, block_size: int = 4, windows: tuple[int, ...] = (0,), poison: int = -1, explode: int = -1, **limits: object
) -> Engine:
    """An engine over a RecallExecutor. `limits`: fields of SchedulerConfig."""
    manifest = toy_manifest(kv=toy_kv(block_size, windows))
    fields: dict = {
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "reserve_blocks": 1,
        "eos_token_ids": frozenset({EOS}),
    }
    settled = SchedulerConfig(**{**fields, "block_size": block_size, "num_blocks": num_blocks, **limits})
    executor = RecallExecutor(block_size, windows=windows, poison=poison, explode=explode)
    executor.allocate_kv(num_blocks)
    builder: BatchBuilder = make_builder(manifest, settled)
    model = LoadedModel(manifest=manifest, executor=executor, builder=builder, limits=settled, num_canary_tokens=0, startup_ms={})
    return Engine(EngineConfig(artifact="none"), model)


def request(request_id: str, prompt: list[int], **sampling: object) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**sampling))


def run_all(engine: Engine, requests: list[GenerateRequest]) -> dict[str, list[TokenEvent]]:
    """Add everything, step until nothing is left; events by request id."""
    events: dict[str, list[TokenEvent]] = {one.request_id: [] for one in requests}
    for one in requests:
        engine.add(one)
    while engine.has_work():
        for event in engine.step():
            events[event.request_id].append(event)
        engine._scheduler.check()
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]
