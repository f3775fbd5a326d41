"""One client request in the engine: its sequences go in, text comes out, each ends exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.messages import FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs
from llmc.runtime.server.front import Front, cache_salt_of
from llmc.runtime.server.sampling import for_choice
from llmc.runtime.text import TextStream

_ENGINE_CODES = {400: "invalid_value", 404: "model_not_found", 429: "queue_full"}  # of what the engine refuses; else it is its own fault


def check_task(front: Front, *, pool: bool) -> None:
    """Refuse a request for what the artifact was not compiled for.

    Raises:
        RequestRejected: naming the endpoints that work.
    """
    if pool and not front.model.embeds:
        raise RequestRejected(
            "this artifact generates text; for embeddings serve one made with llmc compile --task embed", code="wrong_task"
        )
    if front.model.embeds and not pool:
        raise RequestRejected(
            "this artifact was compiled with --task embed and generates no text; it answers /v1/embeddings, /v1/score and /v1/rerank",
            code="wrong_task",
        )


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(slots=True)
class Delta:
    """What one event added to one choice."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None  # the stop string or token that ended it, as vLLM shows it; None for the model's own end token
    embedding: bytes | None = None  # float32, of a request that pools


@dataclass(slots=True)
class _Sequence:
    """One running sequence."""

    index: int
    prompt: list[int]
    text: TextStream
    last_token_at: float = 0.0
    first_token_at: float = 0.0
    scheduled_at: float = 0.0
    num_tokens: int = 0


class Generation:
    """Runs `n` samples of each prompt. Choice i of prompt p has the index p * n + i."""

    def __init__(
        self,
        front: Front,
        request: Request,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        shown_special: dict[int, str] | None = None,
        pool: bool = False,
        lora: str | None = None,
    ) -> None:
        """Submit everything. Must be closed in the end, whatever happens.

        Args:
            cache_salt: the client's own, beside its key's.
            shown_special: special tokens that are text all the same, as marks of a reply's parts are.
            pool: what is wanted is each prompt's vector.
            lora: the adapter to run with, by name; None: the model itself.

        Raises:
            RequestRejected: the engine takes nothing now, or runs sequences as they come whatever their priority.
        """
        if priority and front.settings.engine.get("scheduling_policy") != "priority":
            raise RequestRejected(
                "priority would have no effect: sequences run as they come; leave it out, or serve with --scheduling-policy priority",
                param="priority",
                code="invalid_value",
            )
        self._front = front
        self._started = time.monotonic()
        self._sequences: dict[str, _Sequence] = {}
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self.num_prompt_tokens = sum(self._prompt_lengths)
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._n = sampling.n
        self._stop_token_ids = frozenset(sampling.stop_token_ids or ())
        self._first_token_s: float | None = None
        self._num_output: dict[int, int] = {}  # by choice
        self._client_left = False
        request.scope["llmc.generation"] = self  # for traces
        base, salt = request.scope["llmc.request_id"], cache_salt_of(request, cache_salt)
        messages = []
        for index in range(len(prompts) * sampling.n):
            prompt, choice = prompts[index // sampling.n], index % sampling.n
            request_id = f"{base}-{index}"
            text = TextStream(
                front.model.tokenizer,
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
                shown_special=shown_special,
                prompt=prompt,
            )
            self._sequences[request_id] = _Sequence(index=index, prompt=prompt, text=text)
            messages.append(
                GenerateRequest(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    sampling=for_choice(sampling, choice),
                    priority=priority,
                    arrival_time=self._started,
                    cache_salt=salt,
                    pool=pool,
                    lora=lora,
                )
            )
        self._stream = front.client.submit(messages)
        self._stream.on_cut = request.scope["llmc.abort"]
        front.metrics.prompt_tokens.inc(sum(len(m.prompt_token_ids) for m in messages))
        front.metrics.request_params_n.observe(sampling.n)
        front.metrics.request_params_max_tokens.observe(sampling.max_tokens or 0)
        self._watcher = asyncio.get_running_loop().create_task(self._watch(request.receive))

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What the engine gave, as it comes, until every sequence has ended.

        Raises:
            RequestRejected: the engine ended a sequence with an error; the others are stopped.
            ClientGone: the client left, or was too slow and was cut.
        """
        try:
            while self._sequences:
                events = await self._stream.get()
                if not events:
                    raise ClientGone
                deltas = [delta for event in events if (delta := self._take(event)) is not None]
                if deltas:
                    yield deltas
            if self._client_left:  # while the caller sent something, which then waits
                raise ClientGone
        finally:
            self.close()

    def close(self) -> None:
        """Stop what still runs. May be called again."""
        self._watcher.cancel()
        for request_id in list(self._sequences):
            self._end(request_id, "abort")
        self._front.client.abort_stream(self._stream)

    def usage(self) -> dict[str, Any]:
        """The usage object of OpenAI's answers."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def running_usage(self, index: int) -> dict[str, Any]:
        """Usage so far as a chunk of choice `index` shows it: its own prompt and its own tokens."""
        num_prompt, num_output = self._prompt_lengths[index // self._n], self._num_output.get(index, 0)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}

    def timing(self) -> dict[str, Any]:
        """The `metrics` object of an answer: how long this request took so far, in milliseconds."""
        elapsed = time.monotonic() - self._started
        first = self._first_token_s
        after_first = self.num_output_tokens - len(self._num_output)
        return {
            "time_to_first_token_ms": None if first is None else round(first * 1000, 3),
            "end_to_end_ms": round(elapsed * 1000, 3),
            "time_per_output_token_ms": None if first is None or after_first < 1 else round((elapsed - first) * 1000 / after_first, 3),
            "output_tokens_per_second": round(self.num_output_tokens / elapsed, 3) if elapsed > 0 else None,
        }

    async def _watch(self, receive: Any) -> None:
        """Free the sequences as soon as the client is gone, whatever the handler is waiting for."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self._client_left = bool(self._sequences)
        for request_id in list(self._sequences):
            self._end(request_id, "abort")
        self._front.client.abort_stream(self._stream)

    def _take(self, event: TokenEvent) -> Delta | None:
        sequence = self._sequences.get(event.request_id)
        if sequence is None:
            return None
        if event.finish_reason == "error":
            self._end(event.request_id, "error")
            status, message = event.error_status, event.error or "the engine failed on this request"
            code = event.error_code or _ENGINE_CODES.get(status, "engine_error")
            raise RequestRejected(message, status=status, param=event.error_param, code=code)
        finish = event.finish_reason
        stop_reason: int | str | None = event.stop_token_id if event.stop_token_id in self._stop_token_ids else None
        before = sequence.text.num_tokens
        # An end token's text is shown only if asked for, as a stop string's is.
        shown_ids = event.token_ids
        if event.stop_token_id is not None and shown_ids and shown_ids[-1] == event.stop_token_id and not sequence.text.include_stop:
            shown_ids = shown_ids[:-1]
        text = sequence.text.push(shown_ids, last=finish is not None)
        if sequence.text.matched_stop is not None:
            used = sequence.text.num_tokens - before
            finish, stop_reason = "stop", sequence.text.matched_stop
            event_ids = event.token_ids[:used]
            if event.finish_reason is None:
                self._front.client.abort(event.request_id, "stop")
        else:
            event_ids = event.token_ids
        self._count(sequence, event, len(event_ids))
        if finish is not None:
            self._end(event.request_id, finish)
        return Delta(
            index=sequence.index,
            text=text,
            token_ids=event_ids,
            logprobs=event.logprobs[: len(event_ids)] if event.logprobs is not None else None,
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish,
            stop_reason=stop_reason,
            embedding=event.embedding,
        )

    def _count(self, sequence: _Sequence, event: TokenEvent, num_new: int) -> None:
        """Count the event's tokens up to a stop string; speculative decoding may have given more."""
        if not num_new:
            return
        now, metrics = time.monotonic(), self._front.metrics
        metrics.generation_tokens.inc(num_new)
        self.num_output_tokens += num_new
        self._num_output[sequence.index] = self._num_output.get(sequence.index, 0) + num_new
        if self._first_token_s is None:
            self._first_token_s = now - self._started
        if sequence.num_tokens == 0:
            sequence.first_token_at, sequence.scheduled_at = now, event.scheduled_at
            metrics.time_to_first_token.observe(now - self._started)
            if sequence.index % self._n == 0:  # n samples share one prompt, which usage counts once
                self.num_cached_tokens += event.num_cached_tokens
        else:
            metrics.inter_token_latency.observe((now - sequence.last_token_at) / num_new)
        sequence.num_tokens += num_new
        sequence.last_token_at = now

    def _end(self, request_id: str, reason: FinishReason) -> None:
        """Take a sequence off the list and count its end, once."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        metrics = self._front.metrics
        metrics.ended(reason)
        if reason in ("stop", "length"):
            metrics.request_prompt_tokens.observe(len(sequence.prompt))
            metrics.request_generation_tokens.observe(sequence.num_tokens)
            metrics.e2e_latency.observe(time.monotonic() - self._started)
            if sequence.scheduled_at:  # it gave a token
                metrics.queue_time.observe(max(0.0, sequence.scheduled_at - self._started))
                metrics.prefill_time.observe(sequence.first_token_at - sequence.scheduled_at)
                metrics.decode_time.observe(sequence.last_token_at - sequence.first_token_at)
                metrics.inference_time.observe(sequence.last_token_at - sequence.scheduled_at)
            if not self._sequences:
                metrics.request_max_num_generation_tokens.observe(max(self._num_output.values(), default=0))
            if sequence.num_tokens > 1:
                metrics.time_per_output_token.observe((sequence.last_token_at - sequence.first_token_at) / (sequence.num_tokens - 1))
