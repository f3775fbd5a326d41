"""The engine: a loaded model, a scheduler, a runner. Knows token ids, neither HTTP nor text."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from llmc.errors import DeviceLost, RequestRejected
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.load import LoadedModel, load_model
from llmc.runtime.lora import AdapterPath
from llmc.runtime.messages import AdapterChange, EngineReady, EngineStats, FinishReason, GenerateRequest, TokenEvent, refusal
from llmc.runtime.pooling_runner import PoolingRunner
from llmc.runtime.runner import ModelRunner
from llmc.runtime.sampler import Sampler
from llmc.runtime.sampling_params import check, check_token_ids
from llmc.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from llmc.runtime.grammar.service import GrammarService
    from llmc.runtime.lora.store import AdapterStore
    from llmc.runtime.speculation.drafter import ModelDrafter

__all__ = ["Engine", "EngineConfig"]

_GRAMMAR_WAIT_S = 0.01  # of an engine that has nothing else to do; new requests wait that long


class Engine:
    """One loaded artifact, ready to generate. Not thread-safe: one thread calls it.

    Args:
        config: what to load and how.
        model: loaded already, as tests do; None loads what `config` names.

    Attributes:
        manifest: the artifact's.
        ready: limits and start-up times, as the front process is told them.

    Raises:
        ArtifactError: the artifact is damaged, foreign, or computes something else than its compiler did.
        ConfigError: a setting does not fit the artifact or the machine.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel | None = None) -> None:
        model = model if model is not None else load_model(config)
        limits = model.limits
        self.manifest = model.manifest
        self._config = config
        self._executor = model.executor
        self._sampler = Sampler(eos_token_ids=model.manifest.tokenizer.eos_token_ids, seed=config.seed)
        pooling = model.manifest.pooling
        self._pooling = PoolingRunner(model.executor, model.builder, pooling) if pooling is not None else None
        self._adapters = model.adapters if config.enable_lora else None
        self._generating = ModelRunner(model.executor, self._sampler, model.builder, self._adapters)
        self._runner: ModelRunner | PoolingRunner = self._pooling or self._generating
        self._drafter = self._make_drafter(model)
        self._scheduler = Scheduler(limits, model.manifest.kv, drafter=self._drafter)
        self._tokenizer = model.tokenizer
        self._grammars: GrammarService | None = None
        self._removed_adapters: set[int] = set()  # that accepted requests may still use
        self._adapters_awaited: dict[str, int] = {}  # of requests whose grammars are being compiled
        self._closed = False
        self.ready = EngineReady(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_model_len=self._scheduler.max_sequence_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_loras=limits.max_loras,
            startup_ms=dict(model.startup_ms),
        )

    def add(self, request: GenerateRequest) -> None:
        """Accept one sequence; from now on it ends with exactly one event that has a finish_reason.

        Raises:
            RequestRejected: a parameter or the prompt cannot run here, or the queue is full. A grammar is compiled while other
                requests run; when that fails, an event says so.
        """
        vocab_size = self.manifest.model.vocab_size
        sampling = request.sampling
        if request.pool != (self._pooling is not None):
            made_for = "embeddings (llmc compile --task embed)" if self._pooling is not None else "generating text (no --task embed)"
            raise RequestRejected(f"this artifact was compiled for {made_for}", code="wrong_task")
        if sampling.n != 1:
            raise RequestRejected(f"n is {sampling.n} in one engine request; n sequences are n requests", param="n")
        check(sampling, vocab_size=vocab_size, max_logprobs=self._config.max_logprobs, max_model_len=self.ready.max_model_len)
        check_token_ids(request.prompt_token_ids, vocab_size=vocab_size, param="prompt")
        adapter = self._adapter_of(request)
        if sampling.structured_outputs is not None:
            self._grammar_service().add(request)
            if adapter:  # its name may be gone, or another's, when the grammar is ready
                self._adapters_awaited[request.request_id] = adapter
        else:
            self._scheduler.add(request, adapter)

    def add_adapter(self, adapter: AdapterPath) -> None:
        """Read a LoRA adapter; requests may name it from now on.

        Raises:
            ConfigError: it cannot be served here, or its name is taken.
        """
        self._adapter_store().add(adapter)

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those accepted before go on, then its memory is freed.

        Raises:
            RequestRejected: there is no such adapter.
        """
        self._removed_adapters.add(self._adapter_store().remove(name))
        self._forget_adapters()

    def change_adapter(self, change: AdapterChange) -> None:
        """What the front asks for: `add_adapter` or `remove_adapter`."""
        if change.load is not None:
            self.add_adapter(change.load)
        elif change.unload is not None:
            self.remove_adapter(change.unload)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[TokenEvent]:
        """End a sequence now and free its blocks. An unknown id gives no event: it may just have finished."""
        if self._grammars is not None and self._grammars.discard(request_id):
            self._adapters_awaited.pop(request_id, None)
            return self._forget_finished([TokenEvent(request_id=request_id, token_ids=[], finish_reason=reason)])
        return self._forget_finished(self._scheduler.abort(request_id, reason))

    def step(self) -> list[TokenEvent]:
        """Run one step and return what became of its sequences.

        What fails for one sequence ends that sequence alone. What fails for the step as a whole, which only a bug of ours can cause,
        ends every sequence with an error, and the engine goes on.

        Raises:
            DeviceLost: a GPU kernel failed; this engine is at its end, and only `close` may follow.
        """
        admitted = self._admit_compiled() if self._grammars is not None else []
        if self._grammars is not None and not self._scheduler.has_work() and not self._scheduler.num_in_flight:
            return admitted  # the others still wait for their grammars
        try:
            if not self._scheduler.num_in_flight:
                self._runner.submit(self._scheduler.plan())  # who runs, how many tokens each, in which blocks
            self._submit_ahead()
            events = self._scheduler.commit(self._runner.collect())  # their tokens
        except DeviceLost:
            raise
        except Exception as error:
            self._runner.reset()
            events = self._scheduler.fail_all(f"the engine's step failed: {error}")
        return admitted + self._forget_finished(events)

    def has_work(self) -> bool:
        """Whether a sequence is waiting or running, or a step that nobody wants any more is to be collected."""
        return (
            self._scheduler.has_work()
            or self._scheduler.num_in_flight > 0
            or (self._grammars is not None and self._grammars.num_waiting > 0)
        )

    def stats(self) -> EngineStats:
        """The scheduler's state and counters, and the runner's."""
        steps = self._generating.steps
        running: list[str] = []
        waiting: list[str] = []
        if self._adapters is not None:
            running, waiting = (sorted(map(self._adapters.name_of, numbers)) for numbers in self._scheduler.adapters())
        found = self._scheduler.stats()
        return msgspec.structs.replace(
            found,
            # Only grammars are waited for, which have limits of their own: this call is all the progress there is to make.
            time=found.time if self._scheduler.has_work() else time.monotonic(),
            running_loras=running,
            waiting_loras=waiting,
            steps_sampled_on_device=steps.on_device,
            steps_sampled_on_host=steps.on_host,
            steps_ahead=steps.ahead,
        )

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes; running sequences go on. Returns the number of blocks freed."""
        if self._drafter is not None:
            self._drafter.drop_cache()
        return self._scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Free weights, KV cache and handles. The engine cannot be used afterwards; doing it twice is fine."""
        if not self._closed:
            self._closed = True
            if self._grammars is not None:
                self._grammars.close()
            if self._tokenizer is not None:
                self._tokenizer.close()
            if self._drafter is not None:
                self._drafter.close()
            self._executor.close()

    def _make_drafter(self, model: LoadedModel) -> ModelDrafter | None:
        if model.draft is None:
            return None
        from llmc.runtime.speculation.drafter import ModelDrafter  # few have a draft model

        return ModelDrafter(model.draft, self._sampler)

    def _adapter_of(self, request: GenerateRequest) -> int:
        """The number of a request's adapter; 0 for none.

        Raises:
            RequestRejected: there is no such adapter.
        """
        if request.lora is None:
            return 0
        return self._adapter_store().number_of(request.lora)

    def _adapter_store(self) -> AdapterStore:
        if self._adapters is None:
            raise RequestRejected("this engine was started without --enable-lora, so it has no adapters", status=404, param="model")
        return self._adapters

    def _forget_adapters(self) -> None:
        """Free what removed adapters kept, once no accepted request uses them."""
        assert self._adapters is not None
        for number in self._removed_adapters.difference(*self._scheduler.adapters(), self._adapters_awaited.values()):
            self._adapters.forget(number)
            self._removed_adapters.remove(number)

    def _grammar_service(self) -> GrammarService:
        """What follows grammars, made with the first request that has one: a start without any pays nothing for it.

        Raises:
            RequestRejected: this artifact cannot have structured output.
        """
        if self._grammars is None:
            eos_token_ids = self.manifest.tokenizer.eos_token_ids
            if self._tokenizer is None or not eos_token_ids:
                lacking = "a tokenizer" if self._tokenizer is None else "an end token"
                raise RequestRejected(f"structured output needs {lacking}, and this artifact has none", param="structured_outputs")
            from llmc.runtime.grammar.service import GrammarService

            self._grammars = self._generating.grammars = GrammarService(
                self._tokenizer.read,
                vocab_size=self.manifest.model.vocab_size,
                eos_token_ids=eos_token_ids,
                max_sequence_tokens=self.ready.max_model_len,
                max_waiting=self._config.max_queue + self.ready.max_num_seqs,
            )
        return self._grammars

    def _submit_ahead(self) -> None:
        """Begin the next step before this one's tokens are known, where neither the runner nor the scheduler needs them for that."""
        if self._pooling is None and self._generating.can_follow():
            ahead = self._scheduler.plan_ahead()
            if ahead is not None:
                self._generating.submit_following(ahead)

    def _admit_compiled(self) -> list[TokenEvent]:
        """Hand requests whose grammar is ready to the scheduler; the events of those that cannot run."""
        assert self._grammars is not None
        events: list[TokenEvent] = []
        for request, problem in self._grammars.poll(0.0 if self._scheduler.has_work() else _GRAMMAR_WAIT_S):
            adapter = self._adapters_awaited.pop(request.request_id, 0)
            try:
                if problem is not None:
                    raise problem
                self._scheduler.add(request, adapter)
            except RequestRejected as error:
                events.append(refusal(request.request_id, error))
        return self._forget_finished(events)

    def _forget_finished(self, events: list[TokenEvent]) -> list[TokenEvent]:
        if self._removed_adapters:
            self._forget_adapters()
        for event in events:
            if event.finish_reason is not None:
                self._sampler.forget(event.request_id)
                if self._pooling is not None:
                    self._pooling.forget(event.request_id)
                if self._grammars is not None:
                    self._grammars.forget(event.request_id)
        return events
