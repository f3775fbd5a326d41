"""`llmc.LLM`: an artifact in this process, text in and text out. The same engine as `llmc serve`, without the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import numpy as np

from llmc.artifacts.verify import OpenArtifact, open_artifact
from llmc.errors import ConfigError, InternalError, RequestRejected
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.load import load_model
from llmc.runtime.lora import AdapterPath
from llmc.runtime.lora.request import LoRARequest
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs
from llmc.runtime.outputs import CompletionOutput, Logprob, RequestOutput, logprob_table
from llmc.runtime.sampling_params import check, one_of_n
from llmc.runtime.text import ChatTemplate, TextStream, Tokenizer

Prompt = str | Sequence[int]
Message = dict[str, Any]  # {"role": ..., "content": ...}, and what else the model's template reads

_MAX_WAITING = 1 << 20  # requests of one call wait in the engine; nobody else's are there
_DEFAULT_NAMES = {"max_new_tokens": "max_tokens"}  # generation_config.json's name -> ours


class LLM:
    """A model loaded from an artifact. Use it as a context manager, or call `close`.

    Args:
        model: the artifact's folder.
        generation_config: "auto" takes sampling defaults from the artifact where `generate` is given none; "llmc" (or "vllm") does not.
        options: fields of `EngineConfig`, such as max_model_len, max_num_seqs, kv_cache_memory_bytes, threads, verify_weights.

    Raises:
        ArtifactError: the artifact is damaged, foreign or made for another machine.
        ConfigError: an option is unknown or does not fit.
    """

    def __init__(
        self, model: str | Path, *, generation_config: Literal["auto", "llmc", "vllm"] = "auto", **options: Any
    ) -> None:  # EngineConfig's fields
        if generation_config not in ("auto", "llmc", "vllm"):
            raise ConfigError(f"generation_config={generation_config!r}; accepted: auto, llmc, vllm")
        unknown = sorted(set(options) - set(EngineConfig.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"LLM has no option {unknown[0]!r}; accepted: {', '.join(sorted(EngineConfig.__dataclass_fields__))}")
        config = EngineConfig(**{"max_queue": _MAX_WAITING, **options, "artifact": str(model)})
        trust = Path(config.trust) if config.trust is not None else None
        with open_artifact(model, require_signature=config.require_signature, trust=trust) as artifact:
            self.tokenizer, self._chat_template = _text_parts(artifact)
            loaded = load_model(config, artifact)
        self._defaults = _sampling_defaults(loaded.manifest.generation_defaults) if generation_config == "auto" else SamplingParams()
        self.engine = Engine(config, loaded)
        self._max_logprobs = config.max_logprobs
        self._num_requests = 0
        self._open: dict[str, _Sequence] = {}  # not ended, by request id
        self._adapters = {adapter.name: adapter.path for adapter in config.lora_modules}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters."""
        return self._defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, batched.

        Args:
            prompts: a text, a list of texts, or token ids: one list, or a list of lists.
            sampling_params: for all prompts, or one per prompt; None: the defaults.
            priority: per prompt; lower runs earlier under the policy "priority".
            lora_request: the LoRA adapter of all prompts, or one per prompt, None for the model itself. Wants enable_lora=True.

        Returns:
            One output per prompt, in order. A sequence that failed alone has finish_reason "error" and says why in `error`.

        Raises:
            RequestRejected: a prompt or parameter cannot run; nothing was generated then.
            ConfigError: an adapter cannot be served.
        """
        listed = _as_list(prompts)
        params = self._params_for(listed, sampling_params)
        priorities = list(priority) if priority is not None else [0] * len(listed)
        if len(priorities) != len(listed):
            raise RequestRejected(f"{len(priorities)} priorities for {len(listed)} prompts; give one each", param="priority")
        adapters = [self._adapter(one) for one in _per_prompt(lora_request, len(listed))]
        jobs = [_Job(self, prompt, one, order, lora) for prompt, one, order, lora in zip(listed, params, priorities, adapters, strict=True)]
        sequences: dict[str, _Sequence] = {}
        try:
            for job in jobs:
                for sequence in job.sequences:
                    self._add(sequence)
                    sequences[sequence.request.request_id] = sequence
            while any(not sequence.finished for sequence in sequences.values()):
                self._step()
        finally:
            for request_id in sequences.keys() & self._open.keys():  # those left after an error or an interrupt; none otherwise
                self._drop(request_id)
        return [job.output(self.tokenizer) for job in jobs]

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[np.ndarray]:
        """The vector of every prompt, batched: float32 [hidden_size]. For artifacts compiled with --task embed.

        Raises:
            RequestRejected: a prompt is too long, or the artifact is for generating.
            InternalError: the engine failed on a prompt.
        """
        params = SamplingParams(max_tokens=1)
        requests = [
            GenerateRequest(request_id=self._next_id(), prompt_token_ids=self.encode_prompt(prompt), sampling=params, pool=True)
            for prompt in _as_list(prompts)
        ]
        vectors: dict[str, np.ndarray] = {}
        try:
            for request in requests:
                self.engine.add(request)
            while len(vectors) < len(requests):
                for event in self.engine.step():
                    if event.embedding is None:
                        raise InternalError(event.error or f"request {event.request_id} ended without a vector; please report this")
                    vectors[event.request_id] = np.frombuffer(event.embedding, dtype="<f4")
        finally:
            for request in requests:  # those left after an error or an interrupt; none otherwise
                self.engine.abort(request.request_id)
        return [vectors[request.request_id] for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next turn of one conversation, or of several.

        Args:
            messages: a conversation is a list of {"role", "content"}.
            add_generation_prompt: open the assistant's turn.
            chat_template_kwargs: further variables of the model's template, such as enable_thinking.
            lora_request: as `generate`.

        Raises:
            RequestRejected: the artifact has no chat template, or it refuses the messages; and as `generate`.
        """
        several: Any = messages  # a list of dicts is one conversation, a list of lists several
        conversations = [several] if messages and isinstance(messages[0], dict) else several
        prompts = [self.encode_chat(one, add_generation_prompt, **(chat_template_kwargs or {})) for one in conversations]
        return self.generate(prompts, sampling_params, lora_request=lora_request)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, as the model's chat template writes it.

        Raises:
            RequestRejected: the artifact has no chat template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise RequestRejected("this model has no chat template; use generate with a finished prompt", param="messages")
        text = self._chat_template.render([dict(message) for message in messages], add_generation_prompt, **template_kwargs)
        return self._text_tokenizer().encode(text, add_special_tokens=False)  # the template writes bos and the like itself

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, lora_request: LoRARequest | None = None
    ) -> Iterator[str]:
        """Generate for one prompt and give its text piece by piece.

        Raises:
            RequestRejected: as `generate`, or n above 1, or the sequence failed.
        """
        (params,) = self._params_for([prompt], sampling_params)
        if params.n != 1:
            raise RequestRejected(f"n={params.n}; a stream is one sequence", param="n")
        (sequence,) = _Job(self, prompt, params, 0, self._adapter(lora_request)).sequences
        self._add(sequence)
        try:
            while (piece := sequence.fresh()) or not sequence.finished:
                if piece:
                    yield piece
                else:
                    self._step()
            if sequence.error is not None:
                raise RequestRejected(sequence.error, status=500)
        finally:
            self._drop(sequence.request.request_id)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, special tokens added as the tokenizer does."""
        return self._text_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _adapter(self, request: LoRARequest | None) -> str | None:
        """The name an adapter has in the engine, which reads it when it is new."""
        if request is None:
            return None
        known = self._adapters.get(request.lora_name)
        if known is None:
            self.engine.add_adapter(AdapterPath(name=request.lora_name, path=request.lora_path))
            self._adapters[request.lora_name] = request.lora_path
        elif known != request.lora_path:
            raise RequestRejected(f"adapter {request.lora_name!r} was read from {known}; give the one of another folder another name")
        return request.lora_name

    def _add(self, sequence: _Sequence) -> None:
        """Begin a sequence."""
        self.engine.add(sequence.request)
        self._open[sequence.request.request_id] = sequence

    def _drop(self, request_id: str) -> None:
        """End a sequence, if it has not ended."""
        self._open.pop(request_id, None)
        self.engine.abort(request_id)

    def _step(self) -> None:
        """Step once. Every sequence gets what is its own, whoever asked for the step: several streams may be read by turns."""
        if not self.engine.has_work():
            raise InternalError(f"the engine forgot {len(self._open)} sequences; please report this")
        for event in self.engine.step():
            sequence = self._open.get(event.request_id)
            if sequence is None:
                continue  # it was ended by a stop string in this very step
            sequence.take(event, self.engine)
            if sequence.finished:
                del self._open[event.request_id]

    def _params_for(self, prompts: Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        params = (
            [self._defaults] * len(prompts)
            if given is None
            else [given] * len(prompts)
            if isinstance(given, SamplingParams)
            else list(given)
        )
        if len(params) != len(prompts):
            raise RequestRejected(
                f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one each", param="sampling_params"
            )
        for one in params:
            check(
                one,
                vocab_size=self.engine.manifest.model.vocab_size,
                max_logprobs=self._max_logprobs,
                max_model_len=self.engine.ready.max_model_len,
            )
        return params

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestRejected("this artifact has no tokenizer; give token ids", param="prompt")
        return self.tokenizer

    def _next_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)


class _Job:
    """One prompt and the sequences made for it."""

    def __init__(self, llm: LLM, prompt: Prompt, params: SamplingParams, priority: int, lora: str | None = None) -> None:
        self.prompt = prompt if isinstance(prompt, str) else None
        self.token_ids = llm.encode_prompt(prompt)
        self.request_id = llm._next_id()
        if params.stop and llm.tokenizer is None:
            raise RequestRejected("stop strings need a tokenizer, and this artifact has none; use stop_token_ids", param="stop")
        self.sequences = [
            _Sequence(
                GenerateRequest(
                    request_id=f"{self.request_id}.{index}",
                    prompt_token_ids=self.token_ids,
                    sampling=one_of_n(params, index),
                    priority=priority,
                    lora=lora,
                ),
                llm.tokenizer if params.detokenize else None,
            )
            for index in range(params.n)
        ]

    def output(self, tokenizer: Tokenizer | None) -> RequestOutput:
        first = self.sequences[0]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if first.prompt_logprobs is not None:
            prompt_logprobs = [None if entry is None else logprob_table(entry, tokenizer) for entry in first.prompt_logprobs]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[sequence.output(index, tokenizer) for index, sequence in enumerate(self.sequences)],
            num_cached_tokens=first.num_cached_tokens,
        )


class _Sequence:
    """One sequence's events, collected into an output. Changed by `take` alone."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer | None) -> None:
        params = request.sampling
        self.request = request
        self.finished = False
        self.error: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_cached_tokens = 0
        self._text: list[str] = []
        self._num_streamed = 0  # of these pieces
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._end: TokenEvent | None = None
        self._stream = (
            TextStream(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                prompt=request.prompt_token_ids,
            )
            if tokenizer is not None
            else None
        )

    def fresh(self) -> str:
        """The text that came since the last call."""
        first, self._num_streamed = self._num_streamed, len(self._text)
        return "".join(self._text[first:])

    def take(self, event: TokenEvent, engine: Engine) -> None:
        """Take in one event of this sequence. Ends the sequence in `engine` where a stop string is complete."""
        self.prompt_logprobs = event.prompt_logprobs if event.prompt_logprobs is not None else self.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        before = self._stream.num_tokens if self._stream is not None else 0
        self._text.append(self._push(event))
        stopped = self._stream is not None and self._stream.matched_stop is not None
        # Tokens behind a stop string, which speculative decoding may have given in the same step, are not part of the output.
        used = self._stream.num_tokens - before if self._stream is not None and stopped else len(event.token_ids)
        self._token_ids += event.token_ids[:used]
        self._logprobs += (event.logprobs or [])[:used]
        if event.finish_reason is not None:
            self.finished, self.error, self._end = True, event.error, event
        elif stopped:
            self.finished = True
            engine.abort(self.request.request_id, "stop")

    def output(self, index: int, tokenizer: Tokenizer | None) -> CompletionOutput:
        stop: int | str | None = self._stream.matched_stop if self._stream is not None else None
        if stop is None and self._end is not None and self._end.stop_token_id in (self.request.sampling.stop_token_ids or []):
            stop = self._end.stop_token_id
        ended = self._end.finish_reason if self._end is not None else None
        asked = self.request.sampling.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=sum(entry.logprob for entry in self._logprobs) if asked else None,
            logprobs=[logprob_table(entry, tokenizer) for entry in self._logprobs] if asked else None,
            finish_reason="stop" if isinstance(stop, str) else ended or "abort",
            stop_reason=stop,
            error=self.error,
        )

    def _push(self, event: TokenEvent) -> str:
        if self._stream is None:
            return ""
        shown = event.token_ids
        if event.stop_token_id is not None and not self.request.sampling.include_stop_str_in_output:
            shown = shown[:-1]  # the token that ended it is no part of the text
        return self._stream.push(shown, last=event.finish_reason is not None)


def _text_parts(artifact: OpenArtifact) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of an artifact, where it has them."""
    facts = artifact.manifest.tokenizer
    tokenizer = Tokenizer.from_bytes(artifact.read(facts.tokenizer_json)) if facts.tokenizer_json is not None else None
    template = None
    if facts.chat_template is not None:
        template = ChatTemplate(artifact.read(facts.chat_template).decode(), facts.special_tokens)
    return tokenizer, template


def _sampling_defaults(facts: dict[str, Any]) -> SamplingParams:
    known = {_DEFAULT_NAMES.get(name, name): value for name, value in facts.items()}
    return msgspec.convert({name: known[name] for name in known if name in SamplingParams.__struct_fields__}, SamplingParams)


def _per_prompt(given: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> list[LoRARequest | None]:
    """One adapter for all prompts, or one each."""
    if given is None or isinstance(given, LoRARequest):
        return [given] * count
    if len(given) != count:
        raise RequestRejected(f"{len(given)} lora_requests for {count} prompts; give one, or one each", param="lora_request")
    return list(given)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    for item in listed:
        if not isinstance(item, str | Sequence):
            raise RequestRejected(f"a prompt is a text or a list of token ids, found {type(item).__name__}", param="prompts")
    return listed
