"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.errors import name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Delta, Generation, check_task
from llmc.runtime.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs, with_top
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.sampling import bad_word_ids, sampling_params, truncated
from llmc.runtime.server.schemas import CompletionRequest
from llmc.runtime.server.structured import structured_field

_DEFAULT_MAX_TOKENS = 16  # as OpenAI has it


def completions_router(front: Front) -> Router:
    """The route, bound to this server's parts."""
    router = Router()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = parse_body(await request.body(), CompletionRequest)
        check_task(front, pool=False)
        lora = front.check_model(body.model)
        _check_fields(body)
        name_fields(request.scope, structured_outputs=structured_field(body))
        prompts = truncated(front, body, await _prompts(front, body), body.max_tokens)
        sampling = sampling_params(
            front,
            body,
            prompts,
            # A prompt's own log-probabilities need a step; its token is dropped.
            max_tokens=max(1, body.max_tokens) if body.max_tokens is not None else _DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=_prompt_logprobs(body),
            bad_words=await bad_word_ids(front, body),
        )
        generation = Generation(front, request, prompts, sampling, priority=body.priority or 0, cache_salt=body.cache_salt, lora=lora)
        answer = _Answer(front, body, generation, prompts, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.chunks(), generation.close)
        try:
            return json_answer(await answer.whole())
        finally:
            generation.close()

    return router


def _check_fields(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise RequestRejected("max_tokens 0 gives an answer only with echo", param="max_tokens")
    sse.check_options(body)


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """How many top log-probabilities each token of the prompt is to have, for its own field and for the echo; None: none at all."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return -1 if -1 in wanted else max((number for number in wanted if number is not None), default=None)


async def _prompts(front: Front, body: CompletionRequest) -> list[list[int]]:
    """The prompt field's four forms as lists of token ids."""
    prompt: Any = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(prompt[0], str):
        return await front.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
    return [prompt] if isinstance(prompt[0], int) else prompt


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    prompt: list[int]
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    entries: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_entries: list[TokenLogprobs | None] | None = None
    offset: int = 0  # characters before the next token, for text_offset
    opened: bool = False
    end: Delta | None = None


class _Answer:
    """Shapes one generation as text completion objects."""

    def __init__(self, front: Front, body: CompletionRequest, generation: Generation, prompts: list[list[int]], request_id: str) -> None:
        self._front = front
        self._tokenizer = front.model.tokenizer
        self._names = TokenNames(front.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._body = body
        self._generation = generation
        options = body.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._n = body.n or 1
        self._choices = [_Choice(prompt=prompt) for prompt in prompts for _ in range(self._n)]
        self._frame = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": front.now(),
            "model": body.model or front.model.name,
            "system_fingerprint": front.model.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer."""
        async for deltas in self._generation.deltas():
            for delta in deltas:
                self._grow(delta)
        # Prompt log-probabilities were asked of the first of n samples only; they are the prompt's.
        for index, choice in enumerate(self._choices):
            choice.prompt_entries = self._choices[index - index % self._n].prompt_entries
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        answer = {**self._frame, "choices": choices, "usage": self._usage()}
        if self._body.return_metrics:
            answer["metrics"] = self._generation.timing()
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The streamed answer, event by event."""
        frame = {**self._frame, "usage": None} if self._include_usage else self._frame
        async for deltas in self._generation.deltas():
            out = b"".join(self._chunk_of(frame, delta) for delta in deltas)
            if out:
                yield out
        last = {"usage": self._usage()} if self._include_usage else {}
        if self._body.return_metrics:
            last["metrics"] = self._generation.timing()
        if last:
            yield sse.event({**frame, "choices": [], **last})
        yield sse.DONE

    def _grow(self, delta: Delta) -> _Choice:
        choice = self._choices[delta.index]
        if self._body.max_tokens != 0:
            choice.texts.append(delta.text)
            choice.ids.extend(delta.token_ids)
            choice.entries.extend(delta.logprobs or [])
        choice.prompt_entries = delta.prompt_logprobs or choice.prompt_entries
        if delta.finish_reason is not None:
            choice.end = delta
        return choice

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        assert choice.end is not None
        text = "".join(choice.texts)
        logprobs = None
        if self._body.logprobs is not None:
            ids, entries, offset = choice.ids, choice.entries, 0
            if self._body.echo:
                known = choice.prompt_entries or [None] * len(choice.prompt)
                ids, entries = choice.prompt + ids, with_top(known, self._body.logprobs) + entries
            logprobs = completion_logprobs(self._names, entries, ids, offset)
        answer = {
            "index": index,
            "text": self._prompt_text(choice) + text if self._body.echo else text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._body.max_tokens == 0 else choice.end.finish_reason,
            "stop_reason": choice.end.stop_reason,
        }
        if self._body.prompt_logprobs is not None and choice.prompt_entries is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, with_top(choice.prompt_entries, self._body.prompt_logprobs))
        if self._body.return_token_ids:
            answer["prompt_token_ids"], answer["token_ids"] = choice.prompt, choice.ids
        return answer

    def _chunk_of(self, frame: dict[str, Any], delta: Delta) -> bytes:
        choice = self._grow(delta)
        text, ids, entries = "".join(choice.texts), choice.ids, choice.entries
        new_ids, first = ids, not choice.opened
        choice.texts, choice.ids, choice.entries = [], [], []
        if self._body.echo and not choice.opened:
            text = self._prompt_text(choice) + text
            if self._body.logprobs is not None:
                # Asked of the first of n samples. The others wait for its prompt in the cache, unless that was there before: theirs are
                # then null, as nothing is held back for them.
                known = self._choices[delta.index - delta.index % self._n].prompt_entries or [None] * len(choice.prompt)
                ids, entries = choice.prompt + ids, known + entries
        choice.opened = True
        logprobs = None
        if self._body.logprobs is not None and ids:
            logprobs = completion_logprobs(self._names, entries, ids, choice.offset)
            choice.offset += sum(self._names.num_chars(token_id) for token_id in ids)
        shows_ids = self._body.return_token_ids and (new_ids or first)
        if not text and logprobs is None and delta.finish_reason is None and not shows_ids:
            return b""
        shown = {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            shown["finish_reason"] = "length" if self._body.max_tokens == 0 else delta.finish_reason
            shown["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            shown["token_ids"] = new_ids
            if first:
                shown["prompt_token_ids"] = choice.prompt
        usage = {"usage": self._without_dropped(self._generation.running_usage(delta.index))} if self._continuous_usage else {}
        return sse.event({**frame, "choices": [shown], **usage})

    def _prompt_text(self, choice: _Choice) -> str:
        return self._tokenizer.decode(choice.prompt, self._body.skip_special_tokens is not False)

    def _usage(self) -> dict[str, Any]:
        return self._without_dropped(self._generation.usage())

    def _without_dropped(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Usage without the token that a scored prompt's step made."""
        if self._body.max_tokens == 0:
            usage["completion_tokens"], usage["total_tokens"] = 0, usage["prompt_tokens"]
        return usage
