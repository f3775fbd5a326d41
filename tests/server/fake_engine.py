"""An engine without a model, run in a real engine process: `python -m tests.server.fake_engine` takes the place of the engine command.

It answers a prompt with its options' `reply_ids`, one token per sequence and step, `step_ms` apart. A prompt that holds
one of the trigger ids makes it misbehave, so that a test can ask for a fault by sending a prompt.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from typing import Any

from llmc.errors import ArtifactError, RequestRejected
from llmc.runtime.engine_process import main
from llmc.runtime.messages import EngineReady, EngineStats, GenerateRequest, TokenEvent, TokenLogprobs


class FakeEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        if options.get("fail_start") or os.path.exists(options.get("fail_if", "")):
            raise ArtifactError("manifest.json: format_version 99 is newer than this runtime reads; upgrade llmc")
        time.sleep(options.get("start_s", 0.0))
        self._reply: list[int] = options["reply_ids"]
        self._step_s = options.get("step_ms", 1) / 1000
        self._triggers: dict[str, int] = options.get("triggers", {})
        self._eos = options.get("eos", -1)
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._step = self._prompt_tokens = self._generated = 0
        self._progress = time.monotonic()
        self.ready = EngineReady(
            num_blocks=64,
            block_size=16,
            max_model_len=options.get("max_model_len", 512),
            max_num_seqs=8,
            max_num_batched_tokens=512,
            startup_ms={"fake": 1.0},
        )

    def _has(self, request: GenerateRequest, trigger: str) -> bool:
        return self._triggers.get(trigger, -1) in request.prompt_token_ids

    def add(self, request: GenerateRequest) -> None:
        if self._has(request, "reject"):
            at_fault = "prompt" if request.sampling.structured_outputs is None else "structured_outputs"
            raise RequestRejected("this prompt is refused by the engine", status=400, param=at_fault)
        if self._has(request, "bug"):
            raise KeyError("secret words of the prompt")
        if self._has(request, "die"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._prompt_tokens += len(request.prompt_token_ids)
        self._running[request.request_id] = (request, 0)

    def abort(self, request_id: str, reason: str) -> list[TokenEvent]:
        if self._running.pop(request_id, None) is None:
            return []
        return [TokenEvent(request_id=request_id, token_ids=[], finish_reason=reason)]

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> list[TokenEvent]:
        time.sleep(self._step_s)
        self._step += 1
        self._progress = time.monotonic()
        events = [self._advance(request, done) for request, done in list(self._running.values())]
        return [e for e in events if e is not None]

    def _advance(self, request: GenerateRequest, done: int) -> TokenEvent | None:
        if self._has(request, "hang"):
            time.sleep(3600)
        if self._has(request, "crash"):
            raise ValueError("a step went wrong")
        if request.pool:  # a vector of how often each of ids 70 to 76 stands in the prompt, and its length
            del self._running[request.request_id]
            counts = [float(request.prompt_token_ids.count(token)) for token in range(70, 77)]
            vector = struct.pack("<8f", *counts, len(request.prompt_token_ids))
            return TokenEvent(request_id=request.request_id, token_ids=[], embedding=vector, finish_reason="stop")
        sampling = request.sampling
        reply = request.prompt_token_ids if self._has(request, "parrot") else self._reply
        if self._has(request, "say"):  # what stands before it in the prompt
            reply = request.prompt_token_ids[: request.prompt_token_ids.index(self._triggers["say"])]
        token = reply[done % len(reply)]
        done += 1
        self._generated += 1
        self._running[request.request_id] = (request, done)
        reason = None
        stop_token = None
        if token in (sampling.stop_token_ids or []):
            reason, stop_token = "stop", token
        elif sampling.max_tokens is not None and done >= sampling.max_tokens:
            reason = "length"
        elif done == len(reply) and not sampling.ignore_eos:
            reason = "stop"
        if self._has(request, "token_error") and done == 3:
            del self._running[request.request_id]
            return TokenEvent(
                request_id=request.request_id, token_ids=[], finish_reason="error", error="this sequence failed alone", error_param="prompt"
            )
        if reason is not None:
            del self._running[request.request_id]
        return TokenEvent(
            request_id=request.request_id,
            token_ids=[token],
            logprobs=None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)],
            prompt_logprobs=None
            if sampling.prompt_logprobs is None or done > 1
            else [None, *(_logprobs(t, sampling.prompt_logprobs) for t in request.prompt_token_ids[1:])],
            finish_reason=reason,
            stop_token_id=stop_token,
            num_cached_tokens=4 if done == 1 else 0,
            scheduled_at=self._progress if done == 1 else 0.0,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            step=self._step,
            time=self._progress,
            num_running=len(self._running),
            num_waiting=0,
            kv_blocks_used=len(self._running),
            kv_blocks_total=64,
            prefix_queries_tokens=self._prompt_tokens,
            prefix_hits_tokens=0,
            num_preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
        )

    def close(self) -> None:
        self._running.clear()


def _logprobs(token: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=-0.25, rank=1, top=[((token + i) % 300, -0.25 - i) for i in range(num_top)])


if __name__ == "__main__":
    sys.exit(main(FakeEngine))
