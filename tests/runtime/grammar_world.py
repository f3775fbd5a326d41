"""An engine that talks nonsense in real tokens: the demo model's tokenizer, and logits that are noise."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.executors.logits import Logits
from llmc.runtime.kept_file import KeptFile
from llmc.runtime.load import LoadedModel, make_builder
from llmc.runtime.messages import GenerateRequest, SamplingParams, StructuredOutputsParams, TokenEvent
from llmc.runtime.scheduler import SchedulerConfig
from llmc.runtime.step import DeviceBatch
from llmc.runtime.text import Tokenizer
from tests.runtime.toy_artifact import toy_manifest

TOKENIZER_PATH = Path(__file__).parents[2] / "examples" / "demo_model" / "tokenizer.json"
TOKENIZER = Tokenizer.from_bytes(TOKENIZER_PATH.read_bytes())
END = TOKENIZER.token_id("<|im_end|>")
VOCAB = 2060  # the logits are wider than the tokenizer
MAX_MODEL_LEN = 512
PROMPT = TOKENIZER.encode("Say something.")


class NoiseExecutor:
    """Logits are noise that depends on the last token and its position; some tokens are everybody's favourites, as in real models."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        self._tokens = random.normal(size=(VOCAB, 24)).astype(np.float32)
        self._positions = random.normal(size=(64, 24)).astype(np.float32)
        self._head = random.normal(size=(24, VOCAB)).astype(np.float32)

    def run(self, batch: DeviceBatch) -> Logits:
        rows = batch.logits_indices
        # row by row: a product of many rows may round otherwise
        return Logits(np.stack([(self._tokens[batch.input_ids[r]] + self._positions[batch.positions[r] % 64]) @ self._head for r in rows]))

    def allocate_kv(self, num_blocks: int) -> None: ...

    def close(self) -> None: ...


def noise_engine(**limits: Any) -> Engine:
    """An engine over a NoiseExecutor. `limits`: fields of SchedulerConfig."""
    manifest = toy_manifest()
    model_facts = msgspec.structs.replace(manifest.model, vocab_size=VOCAB)
    tokenizer = msgspec.structs.replace(manifest.tokenizer, tokenizer_json="tokenizer/tokenizer.json", eos_token_ids=[END])
    manifest = msgspec.structs.replace(manifest, model=model_facts, tokenizer=tokenizer)
    fields: dict = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "reserve_blocks": 1,
        "num_blocks": 1024,
        "eos_token_ids": frozenset({END}),
    }
    settled = SchedulerConfig(**{**fields, "block_size": 16, **limits})
    data = TOKENIZER_PATH.read_bytes()
    fd = os.open(TOKENIZER_PATH, os.O_RDONLY)
    try:
        kept = KeptFile(fd, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), name="tokenizer.json")
    finally:
        os.close(fd)
    model = LoadedModel(
        manifest=manifest,
        executor=NoiseExecutor(),
        builder=make_builder(manifest, settled),
        limits=settled,
        num_canary_tokens=0,
        startup_ms={},
        tokenizer=kept,
    )
    return Engine(EngineConfig(artifact="none"), model)


def asking(request_id: str, *, max_tokens: int | None = 100, temperature: float = 1.0, seed: int = 1, **fields: Any) -> GenerateRequest:
    """A request; `fields` of StructuredOutputsParams make it structured, others are SamplingParams'."""
    structured = {name: fields.pop(name) for name in StructuredOutputsParams.__struct_fields__ if name in fields}
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        structured_outputs=StructuredOutputsParams(**structured) if structured else None,
        **fields,
    )
    return GenerateRequest(request_id=request_id, prompt_token_ids=PROMPT, sampling=sampling)


class Output(msgspec.Struct, kw_only=True):
    """What became of one request."""

    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None
    status: int = 0
    param: str | None = None

    @property
    def text(self) -> str:
        return TOKENIZER.decode([token for token in self.token_ids if token != END], skip_special_tokens=False)

    def take(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "a request ended twice"
        self.token_ids += event.token_ids
        if event.finish_reason is not None:
            self.finish_reason, self.error = event.finish_reason, event.error
            self.status, self.param = event.error_status, event.error_param


def run(engine: Engine, requests: list[GenerateRequest], *, steps: int = 1 << 30) -> dict[str, Output]:
    """Add everything and step until nothing is left, or `steps` times."""
    for request in requests:
        engine.add(request)
    return go_on(engine, {request.request_id: Output(token_ids=[]) for request in requests}, steps=steps)


def go_on(engine: Engine, outputs: dict[str, Output], *, steps: int = 1 << 30) -> dict[str, Output]:
    """Step on."""
    while engine.has_work() and steps > 0:
        steps -= 1
        for event in engine.step():
            outputs[event.request_id].take(event)
        engine._scheduler.check()
    return outputs


def one(engine: Engine, **fields: Any) -> Output:
    """One request alone."""
    return run(engine, [asking("one", **fields)])["one"]
