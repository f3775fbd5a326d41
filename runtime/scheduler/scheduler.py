"""Decides who runs in the next step and what became of the last one: `plan` and `commit`, plain Python without a device.

plan     running sequences first, best rank first: one token for each that decodes, the rest of the budget to prompts;
         then requests from the queue while budget, blocks and places last
commit   the step's tokens: appended, checked for an end, handed on as events; blocks that became full are offered to the prefix cache

The ideas: continuous batching (Orca, Yu et al., OSDI 2022), paged KV with recomputation on preemption (Kwon et al. 2023,
arXiv:2309.06180), chunked prefill under a token budget (Sarathi-Serve, Agrawal et al. 2024, arXiv:2403.02310).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from llmc.artifacts.manifest import KVFacts
from llmc.errors import ConfigError, InternalError, RequestRejected
from llmc.runtime.kv import KVManager, max_tokens_that_fit
from llmc.runtime.lora.slots import LoraSlots
from llmc.runtime.messages import EngineStats, FinishReason, GenerateRequest, TokenEvent, refusal
from llmc.runtime.scheduler.admission import SlotQueue, chunk, digests, leave_slot, match, next_digest, take_slot
from llmc.runtime.scheduler.ahead import extend_all, going_on
from llmc.runtime.scheduler.config import SchedulerConfig
from llmc.runtime.scheduler.counters import Counters
from llmc.runtime.scheduler.drafts import NgramDrafter, SpeculationConfig
from llmc.runtime.scheduler.guessing import Drafter, add_guesses, checked_event
from llmc.runtime.scheduler.invariants import check_sequences
from llmc.runtime.scheduler.policy import insert_ranked, remove_ranked
from llmc.runtime.scheduler.request import Sequence, make_sequence, problem_of, share_of
from llmc.runtime.step import SampledToken, ScheduledSequence, StepOutput, StepPlan

# Requests with one prefix wait for the first of them; looking past more than this many would cost every step.
_MAX_PASSED_OVER = 32


class Scheduler:
    """Owns every accepted request until its last event, and the KV pool's books.

    One step is in flight, `plan`, then `commit` (or `fail_all`), then `plan` again; or two, where `plan_ahead` gives another behind
    the first, to be committed after it. `add` and `abort` may come at any time between calls, also while steps are in flight.
    Not thread-safe.

    Args:
        config: limits and choices.
        kv_facts: the artifact's KV layout.
        clock: seconds, as `time.monotonic`; only `stats` shows it.
        secret: key of the prefix cache's hashes; None makes a random one.
        drafter: what guesses where `config` names a draft model; prompt lookup needs none.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_facts: KVFacts,
        *,
        clock: Callable[[], float] = time.monotonic,
        secret: bytes | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        if config.block_size != kv_facts.block_size:
            raise ConfigError(f"block_size={config.block_size} differs from the artifact's {kv_facts.block_size}")
        self.config = config
        self._kv = KVManager(
            kv_facts,
            num_blocks=config.num_blocks,
            max_chunk_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            secret=secret,
        )
        self._tokens_that_fit = max_tokens_that_fit(
            kv_facts, num_blocks=config.num_blocks, max_chunk_tokens=config.max_num_batched_tokens, limit=config.max_model_len
        )
        self._sequences: dict[str, Sequence] = {}  # every live one, by request id
        self._waiting: list[Sequence] = []  # sorted by rank; they hold no blocks
        self._running: list[Sequence] = []  # sorted by rank
        self._num_prefilling = 0  # of the running ones
        self._loras = LoraSlots(config.max_loras)
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._step = 0
        self._drafter = NgramDrafter(config.speculation) if isinstance(config.speculation, SpeculationConfig) else drafter
        if (self._drafter is None) != (config.speculation is None):
            raise InternalError("scheduler: speculation is configured without what guesses, or the other way round; please report this")
        self._clock = clock
        self._counters = Counters(last_progress=clock())

    # Asking changes nothing.

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that can run: max_model_len, or less when the pool is too small for that."""
        return min(self.config.max_model_len, self._tokens_that_fit + 1)

    def has_work(self) -> bool:
        """Whether a live request exists. If so, and no step is in flight, `plan` schedules at least one sequence."""
        return bool(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed: 0 to 2."""
        return len(self._in_flight)

    def stats(self) -> EngineStats:
        """The state and the counters since the start."""
        return self._counters.as_stats(step=self._step, num_running=len(self._running), num_waiting=len(self._waiting), pool=self._kv.pool)

    def adapters(self) -> tuple[set[int], set[int]]:
        """LoRA adapters that running sequences use, and those that waiting ones want."""
        return set(self._loras.running()), {sequence.adapter for sequence in self._waiting if sequence.adapter}

    def check(self) -> None:
        """Recount every invariant; tests call it after every step. Changes nothing.

        Raises:
            InternalError: one does not hold.
        """
        self._kv.check(sequence.blocks for sequence in self._sequences.values())
        check_sequences(self._sequences.values(), self._waiting, self._running, num_prefilling=self._num_prefilling)
        self._loras.check([sequence.adapter for sequence in self._running])
        if self._drafter is not None and not self._drafter.check(set(self._sequences)):
            raise InternalError("scheduler: the books of guesses are wrong, or hold a sequence that has ended")

    # Doing.

    def add(self, request: GenerateRequest, adapter: int = 0) -> None:
        """Accept a request; from now on it ends with exactly one event that has a finish_reason.

        Args:
            adapter: the number of its LoRA adapter; 0: the model itself.

        Raises:
            RequestRejected: it can never run (400), its id is in use (400), or the queue is full (429).
        """
        if request.request_id in self._sequences:
            raise RequestRejected(f"request id {request.request_id} is in use")
        # Counted as the front counts: of a burst, those that will run in the next step wait here too.
        if len(self._sequences) >= self.config.max_num_seqs + self.config.max_queue:
            raise RequestRejected(
                f"{len(self._sequences)} requests are open, as many as run at once and the queue holds; try again later",
                status=429,
                code="queue_full",
            )
        sequence = make_sequence(request, self.config, self._kv, tokens_that_fit=self._tokens_that_fit, adapter=adapter)
        self._sequences[sequence.request_id] = sequence
        insert_ranked(self._waiting, sequence)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[TokenEvent]:
        """End a request now and free its blocks. Unknown ids give no event: it may just have finished.

        While a step is in flight its result for this request is dropped; no other sequence gets the blocks before that
        step's `commit`, because only `plan` allocates.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        self._remove(sequence)
        return [TokenEvent(request_id=request_id, token_ids=[], finish_reason=reason)]

    def fail_all(self, message: str) -> list[TokenEvent]:
        """End every request with an error, for a step that failed as a whole; the step in flight is forgotten."""
        self._in_flight.clear()
        events = []
        for sequence in [*self._running, *self._waiting]:
            self._remove(sequence)
            events.append(TokenEvent(request_id=sequence.request_id, token_ids=[], finish_reason="error", error=message))
        self._loras.clear()  # what was to be brought into slots may not have been
        return events

    def reset_prefix_cache(self) -> int:
        """Forget all cached prefixes. Running sequences go on. Returns the number of blocks that became free."""
        return self._kv.drop_cache()

    def plan(self) -> StepPlan:
        """Choose the next step. Allocates blocks, preempts and admits.

        The plan refers to the scheduler's own lists: it is to be read before the next `plan` or `commit`.

        Raises:
            InternalError: the previous step was not committed.
        """
        if self._in_flight:
            raise InternalError(f"scheduler: plan was called while step {self._step} is in flight; commit it first")
        self._step += 1
        sequences: list[Sequence] = []
        scheduled: list[ScheduledSequence] = []
        # Each decoding sequence is sure of its token, whatever its rank; prompts share what is left.
        prefill_budget = self.config.max_num_batched_tokens - (len(self._running) - self._num_prefilling)
        num_partial = 0
        preemptions_before = self._counters.num_preemptions

        # Preemption takes from the end of this list, so a sequence that is already in the plan stays in it.
        for sequence in self._running:
            start = sequence.num_computed
            if sequence.prefilling:
                count = chunk(self.config, len(sequence.token_ids) - start, prefill_budget, begun=True)
                if start + count < len(sequence.token_ids):
                    num_partial += 1
                if count == 0:
                    continue
                end = start + count
                prefill_budget -= count
            else:
                end = start + 1
            if end > sequence.blocks.ready_tokens and not self._make_room(sequence, start, end):
                break  # it was the last one and gave way itself
            sequences.append(sequence)
            scheduled.append(share_of(sequence, start, end))

        # After a preemption nobody is admitted: the blocks just freed are needed by those who run.
        if self._waiting and self._counters.num_preemptions == preemptions_before:
            self._admit(sequences, scheduled, prefill_budget, num_partial)
        if self._drafter is not None:
            add_guesses(self._drafter, self._kv, self.config, self._running, sequences, scheduled)
        plan = StepPlan(step=self._step, sequences=scheduled, lora_loads=self._loras.take_loads())
        self._in_flight.append((plan, sequences))
        return plan

    def plan_ahead(self) -> StepPlan | None:
        """Choose the step behind the one in flight before that one's tokens are known (`ahead.py`); to be committed after it.

        Allocates blocks, and neither preempts, admits nor guesses; where one of these is due there is no such step. The plan's
        `token_ids` lack the token that is not known yet, until the first step is committed.

        Raises:
            InternalError: not exactly one step is in flight.
        """
        if len(self._in_flight) != 1:
            raise InternalError(f"scheduler: plan_ahead was called with {len(self._in_flight)} steps in flight, it needs one")
        if self._drafter is not None or (self._waiting and len(self._running) < self.config.max_num_seqs):
            return None
        sequences = going_on(*self._in_flight[0])
        if not sequences or not extend_all(self._kv, sequences):
            return None
        self._step += 1
        plan = StepPlan(step=self._step, sequences=[share_of(sequence, known, known + 1) for sequence, known in sequences])
        self._in_flight.append((plan, [sequence for sequence, _ in sequences]))
        return plan

    def commit(self, output: StepOutput) -> list[TokenEvent]:
        """Take the results of the oldest step in flight; returns one event for each sequence that got a token or ended.

        Raises:
            InternalError: no step is in flight, or the output is another step's.
        """
        if not self._in_flight or output.step != self._in_flight[0][0].step:
            raise InternalError(f"scheduler: results of step {output.step} came while step {self._step} was planned; commit each plan once")
        plan, sequences = self._in_flight.popleft()
        tokens = output.tokens
        events: list[TokenEvent] = []
        num_more = 0  # tokens beyond one for each event
        for sequence, share in zip(sequences, plan.sequences, strict=True):
            if sequence.state != "running":
                continue  # aborted while the step was in flight
            request_id = sequence.request_id
            sampled = tokens.get(request_id)
            if sequence.prefilling or share.num_drafts or sampled is None or sampled.error is not None:
                event = self._take_other(sequence, share, sampled, output)
                if event is not None:
                    events.append(event)
                    num_more += len(event.token_ids) - 1
                continue
            # One token of one that decodes: most of what is committed, and most of the scheduler's time
            token_ids, token = sequence.token_ids, sampled.token_id
            end = sequence.num_computed = share.end
            if end >= sequence.blocks.publish_at:
                self._kv.publish(sequence.blocks, token_ids, end)
            token_ids.append(token)
            if token in sequence.stop_token_ids or len(token_ids) >= sequence.max_length or sampled.logprobs is not None:
                events.append(self._notable_token(sequence, sampled))
            else:
                events.append(TokenEvent(request_id=request_id, token_ids=[token]))
        for slot in output.lost_lora_slots:
            self._loras.forget(slot)
        self._counters.generation_tokens += len(events) + num_more
        self._counters.last_progress = self._clock()
        return events

    # Parts of plan.

    def _make_room(self, sequence: Sequence, start: int, end: int) -> bool:
        """Get the blocks for tokens [start, end), preempting from the worst rank; False: the sequence itself was preempted."""
        kv = self._kv
        kv.return_passed(sequence.blocks, start)
        while kv.blocks_to_extend(sequence.blocks, end) > kv.pool.num_available:
            victim = self._running[-1]
            if victim is sequence and len(self._running) == 1:
                raise InternalError(f"scheduler: request {sequence.request_id} holds every block and needs more, though it was accepted")
            self._preempt(victim)
            if victim is sequence:
                return False
        kv.extend(sequence.blocks, end)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; it keeps its tokens and computes their K and V again."""
        remove_ranked(self._running, sequence)
        self._num_prefilling -= sequence.prefilling
        self._kv.free(sequence.blocks)
        leave_slot(self._loras, sequence)
        sequence.num_computed = 0
        sequence.prefilling = True
        sequence.state = "waiting"
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        insert_ranked(self._waiting, sequence)
        self._counters.num_preemptions += 1

    def _admit(self, sequences: list[Sequence], scheduled: list[ScheduledSequence], budget: int, num_partial: int) -> None:
        """Move requests from the queue into the plan, best rank first, until one does not fit."""
        config, kv = self.config, self._kv
        if len(self._running) >= config.max_num_seqs:
            return  # the common case under load
        committed = sum(kv.blocks_to_finish(s.blocks, len(s.token_ids)) for s in self._running if s.prefilling)
        computing = {digest for share, s in zip(scheduled, sequences, strict=True) if s.prefilling for digest in digests(config, s, share)}
        index, most_passed = 0, _MAX_PASSED_OVER
        queue = SlotQueue(self._loras)
        while index < min(len(self._waiting), most_passed) and len(self._running) < config.max_num_seqs and budget > 0:
            sequence = self._waiting[index]
            if queue.must_wait(sequence):
                index += 1
                most_passed += 1  # asking for a slot costs nothing
                continue
            num_tokens = len(sequence.token_ids)
            hit = match(kv, sequence)
            if next_digest(config, sequence, hit) in computing:
                index += 1  # another sequence computes its next block in this very step; one step later it is a hit
                continue
            start = hit.num_blocks * config.block_size
            count = chunk(config, num_tokens - start, budget, begun=False)
            partial = count < num_tokens - start
            if count == 0 or (partial and num_partial >= config.max_num_partial_prefills):
                return
            # All of its tokens must fit beside what running prompts still need, or it would be admitted only to be preempted.
            # Alone it always fits: `add` saw to that.
            needed = kv.blocks_to_admit(hit, num_tokens) + committed + config.reserve_blocks
            if self._running and needed > kv.pool.num_available:
                return
            queue.started(sequence)
            del self._waiting[index]
            kv.attach(sequence.blocks, hit)
            kv.extend(sequence.blocks, start + count)
            self._start(sequence, start)
            committed += kv.blocks_to_finish(sequence.blocks, num_tokens)
            num_partial += partial
            budget -= count
            share = share_of(sequence, start, start + count)
            computing.update(digests(config, sequence, share))
            sequences.append(sequence)
            scheduled.append(share)

    def _start(self, sequence: Sequence, num_cached_tokens: int) -> None:
        sequence.state = "running"
        take_slot(self._loras, sequence)
        sequence.num_computed = num_cached_tokens
        insert_ranked(self._running, sequence)
        self._num_prefilling += 1
        if sequence.num_cached_tokens < 0:  # the first time: after a preemption it would find its own blocks
            sequence.num_cached_tokens = num_cached_tokens
            sequence.scheduled_at = self._clock()
            if self.config.enable_prefix_caching and sequence.prompt_logprobs is None:
                self._counters.prefix_queries_tokens += sequence.num_prompt_tokens
                self._counters.prefix_hits_tokens += num_cached_tokens

    # Parts of commit.

    def _take_other(
        self, sequence: Sequence, share: ScheduledSequence, sampled: SampledToken | None, output: StepOutput
    ) -> TokenEvent | None:
        """What became of a sequence that prefills, had guesses or failed; None: it goes on without a token."""
        end = share.end - share.num_drafts
        samples = end == len(sequence.token_ids)
        problem = problem_of(sequence, share, samples, sampled, output)
        if problem is not None:
            # Nothing of this step is offered to the prefix cache: its K and V may be what is wrong.
            return self._finish_with_error(sequence, problem, sampled)
        sequence.num_computed = end
        self._kv.publish(sequence.blocks, sequence.token_ids, end)
        if not samples or sampled is None:
            return None
        if sampled.embedding is not None:
            return self._finish_pooled(sequence, sampled.embedding)
        if share.num_drafts:
            event = checked_event(sequence, share, sampled, self._kv, self._counters)
            if event.finish_reason is not None:
                self._remove(sequence)
            return event
        sequence.token_ids.append(sampled.token_id)
        return self._notable_token(sequence, sampled)

    def _notable_token(self, sequence: Sequence, sampled: SampledToken) -> TokenEvent:
        """The event of a token that is the first, may be the last, or carries more than its id."""
        token, length = sampled.token_id, len(sequence.token_ids)
        num_cached_tokens, scheduled_at, prompt_logprobs = 0, 0.0, None
        if length == sequence.num_prompt_tokens + 1:
            num_cached_tokens, scheduled_at = sequence.num_cached_tokens, sequence.scheduled_at
            prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
            self._counters.prompt_tokens += sequence.num_prompt_tokens
        if sequence.prefilling:
            sequence.prefilling = False
            self._num_prefilling -= 1
        finish_reason = sequence.end_after(token)
        if finish_reason is not None:
            self._remove(sequence)
        return TokenEvent(
            request_id=sequence.request_id,
            token_ids=[token],
            logprobs=None if sampled.logprobs is None else [sampled.logprobs],
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_token_id=token if finish_reason == "stop" else None,
            num_cached_tokens=num_cached_tokens,
            scheduled_at=scheduled_at,
        )

    def _finish_pooled(self, sequence: Sequence, embedding: bytes) -> TokenEvent:
        """The only event of a sequence that wanted its prompt's vector."""
        self._counters.prompt_tokens += sequence.num_prompt_tokens
        self._remove(sequence)
        return TokenEvent(request_id=sequence.request_id, token_ids=[], embedding=embedding, finish_reason="stop")

    def _finish_with_error(self, sequence: Sequence, message: str, sampled: SampledToken | None) -> TokenEvent:
        self._remove(sequence)
        status, param = (sampled.error_status, sampled.error_param) if sampled is not None else (500, None)
        return refusal(sequence.request_id, RequestRejected(message, status=status, param=param))

    def _remove(self, sequence: Sequence) -> None:
        """Forget a live sequence and free its blocks."""
        del self._sequences[sequence.request_id]
        if sequence.state == "running":
            remove_ranked(self._running, sequence)
            self._num_prefilling -= sequence.prefilling
            leave_slot(self._loras, sequence)
        else:
            remove_ranked(self._waiting, sequence)
        sequence.state = "finished"
        if self._drafter is not None:
            self._drafter.forget(sequence.request_id)
        self._kv.free(sequence.blocks)
