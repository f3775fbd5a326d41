"""Seeded simulation of the scheduler and the KV pool: random lives of requests, every invariant recounted after every step.

    python -m tests.runtime.simulation --steps 1000000 --seed 0

An episode draws a configuration (pool, windows, policy, limits) and a crowd of requests, runs them to the end and checks
that nothing is left. Its seed is `seed:episode`, printed with a failure; `--seed S --episode K` repeats it alone.

The fake runner has a KV cache whose slots hold what they stand for: a hash of the tenant, of the token and of every token
before it. Before a token is computed, all slots its query attends to are compared with that truth, in every KV group, so a
block shared, evicted or given back wrongly is seen at the step that would have read it. The sampled token is a function of
this content, hence the same after preemption, with or without cache hits, chunked or not: each request's whole output is
known beforehand and compared token by token.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmc.artifacts.manifest import KVFacts, KVGroup
from llmc.errors import LlmcError, RequestRejected
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs
from llmc.runtime.scheduler import Scheduler, SchedulerConfig
from llmc.runtime.scheduler.drafts import NgramDrafter, SpeculationConfig
from llmc.runtime.scheduler.policy import rank_of
from llmc.runtime.step import SampledToken, ScheduledSequence, StepOutput, StepPlan

VOCABULARY = 23
EOS = 0
UNKNOWN = -1  # a slot nobody wrote, or of a step that failed


class SimulationError(AssertionError):
    """An invariant does not hold; the message says which, and the command that repeats it."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What an episode draws before it starts."""

    config: SchedulerConfig
    windows: tuple[int, ...]
    num_requests: int
    arrival_rate: float  # requests per step
    abort_rate: float  # per step
    sampler_error_rate: float  # per sampled token
    step_failure_rate: float  # per step
    cache_reset_rate: float  # per step
    knowing_drafter: bool  # guesses are mostly right, which those of prompt lookup are not where tokens are hashes


@dataclass(kw_only=True)
class Client:
    """One request with everything it must get, known before it runs."""

    request: GenerateRequest
    outputs: list[int]
    finish_reason: str
    identities: list[int]  # per position: what a slot holds when it holds this token of this sequence
    deadline_step: int = 0
    received: list[int] = field(default_factory=list)
    ended: str | None = None


@dataclass(kw_only=True)
class Totals:
    """What happened, over all episodes; shows that the simulation reaches the corners it is for."""

    steps: int = 0
    episodes: int = 0
    requests: int = 0
    tokens: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    windows_moved: int = 0
    aborts: int = 0
    errors: int = 0
    rejections: int = 0
    largest_batch: int = 0
    drafts: int = 0
    accepted: int = 0
    steps_ahead: int = 0


def identity_chain(tokens: list[int], salt: str) -> list[int]:
    """What a slot holds per position; hashes of ints, so equal in every process."""
    value, chain = sum(ord(letter) * 31**index for index, letter in enumerate(salt)), []
    for position, token in enumerate(tokens):
        value = hash((value, position, token))
        chain.append(value)
    return chain


def next_token(content: int, seed: int) -> int:
    """The sampled token: decided by what the last slot holds and by the request's own seed."""
    return hash((content, seed, 7)) % VOCABULARY


def make_client(request: GenerateRequest, config: SchedulerConfig, longest: int) -> Client:
    """Work out a request's whole life by the rules of the API, without scheduler or pool.

    Args:
        longest: tokens at which the longest sequence that can run ends.
    """
    sampling = request.sampling
    stops = set(sampling.stop_token_ids or ()) | (set() if sampling.ignore_eos else set(config.eos_token_ids))
    limit = longest if sampling.max_tokens is None else min(longest, len(request.prompt_token_ids) + sampling.max_tokens)
    tokens = list(request.prompt_token_ids)
    chain = identity_chain(tokens, request.cache_salt)
    outputs: list[int] = []
    while True:
        token = next_token(chain[-1], sampling.seed or 0)
        outputs.append(token)
        tokens.append(token)
        chain.append(hash((chain[-1], len(tokens) - 1, token)))
        if token in stops and len(outputs) >= sampling.min_tokens:
            return Client(request=request, outputs=outputs, finish_reason="stop", identities=chain)
        if len(tokens) >= limit:
            return Client(request=request, outputs=outputs, finish_reason="length", identities=chain)


class FakeRunner:
    """Computes a plan on identities instead of tensors and checks all that a plan promises to a real runner."""

    def __init__(self, scenario: Scenario, rng: random.Random, totals: Totals) -> None:
        self._scenario = scenario
        self._rng = rng
        self._totals = totals
        size = scenario.config.block_size
        # Group -> block -> content of its slots. Every layer has tensors for all blocks; a block belongs to one group at a time.
        self._kv = [[[UNKNOWN] * size for _ in range(scenario.config.num_blocks)] for _ in scenario.windows]
        self.num_computed: dict[str, int] = {}

    def check(self, plan: StepPlan, clients: dict[str, Client], *, ahead: bool = False) -> None:
        """Budget, places, nobody twice, and each share continues where the sequence stands; `ahead`: one token further."""
        config = self._scenario.config
        _require(0 < len(plan.sequences) <= config.max_num_seqs, f"a step of {len(plan.sequences)} sequences")
        _require(plan.num_tokens <= config.max_num_batched_tokens, f"{plan.num_tokens} tokens are over the budget")
        _require(len({s.request_id for s in plan.sequences}) == len(plan.sequences), "a sequence is in the plan twice")
        self._totals.largest_batch = max(self._totals.largest_batch, len(plan.sequences))
        partial = 0
        for share in plan.sequences:
            client = clients[share.request_id]
            known = len(client.request.prompt_token_ids) + len(client.received)
            _require(client.ended is None, f"{share.request_id} has ended and runs again")
            _require(len(share.token_ids) == known + share.num_drafts, f"{share.request_id} has {len(share.token_ids)} tokens, not {known}")
            self._totals.drafts += share.num_drafts
            if share.num_drafts:
                most = config.speculation.num_speculative_tokens if config.speculation is not None else 0
                _require(share.num_drafts <= most and share.end == len(share.token_ids), f"{share.request_id}: {share.num_drafts} guesses")
                known += share.num_drafts
            known += ahead
            _require(
                not ahead or share.end - share.start == 1, f"{share.request_id}: {share.end - share.start} tokens ahead of what is known"
            )
            _require(0 <= share.start < share.end <= known, f"{share.request_id}: share [{share.start}, {share.end}) of {known} tokens")
            limit = config.long_prefill_token_threshold if not share.num_drafts else 0
            _require(not limit or share.end - share.start <= limit, f"{share.request_id}: {share.end - share.start} tokens in one step")
            if not config.enable_chunked_prefill and share.end < known:
                _require(known > config.max_num_batched_tokens, f"{share.request_id} runs in chunks, which are off")
            partial += share.end < known
        _require(partial <= config.max_num_partial_prefills, f"{partial} prompts stand half computed")

    def write(self, plan: StepPlan, clients: dict[str, Client], *, fails: bool) -> None:
        """Put K and V of every token into its slot; a step that fails leaves garbage there."""
        size = self._scenario.config.block_size
        written: set[int] = set()
        for share in plan.sequences:
            identities = self.identities(share, clients[share.request_id])
            for group, table in enumerate(share.block_ids):
                _require(len(table) * size >= share.end, f"{share.request_id}: {len(table)} blocks for {share.end} tokens")
                for position in range(share.start, share.end):
                    block, offset = table[position // size], position % size
                    _require(block >= 0, f"{share.request_id}: token {position} is written to a block that was given back")
                    slot = block * size + offset
                    _require(slot not in written, f"slot {slot} is written twice in one step")
                    written.add(slot)
                    if fails:
                        self._kv[group][block] = [UNKNOWN] * size
                    else:
                        self._kv[group][block][offset] = identities[position]

    @staticmethod
    def identities(share: ScheduledSequence, client: Client) -> list[int]:
        """What the slots of a share must hold: behind what is known, that of its guesses."""
        known = max(share.end, len(share.token_ids)) - share.num_drafts  # a step ahead computes a token that is not listed yet
        chain = client.identities[:known]
        for position in range(known, len(share.token_ids)):
            chain.append(hash((chain[-1], position, share.token_ids[position])))
        return chain

    def read(self, share: ScheduledSequence, client: Client) -> int:
        """Compare all slots that queries [start, end) attend to with the truth. Returns the content of the last one."""
        size, identities, end = self._scenario.config.block_size, self.identities(share, client), share.end
        content = UNKNOWN
        for group, (window, table) in enumerate(zip(self._scenario.windows, share.block_ids, strict=True)):
            kv = self._kv[group]
            first = max(0, share.start - window + 1) if window else 0
            for index in range(first // size, -(-end // size)):
                block = table[index]
                low, high = index * size, min(end, (index + 1) * size)
                skip = max(0, first - low)  # the block's front may lie before the window
                found = kv[block][skip : high - low] if block >= 0 else None
                _require(
                    found == identities[low + skip : high],
                    f"{share.request_id}: group {group}, block {index} ({block} in the pool) does not hold tokens [{low + skip}, {high})",
                )
            self._totals.windows_moved += table[0] < 0
            content = kv[table[(end - 1) // size]][(end - 1) % size]
        return content

    def run(self, plan: StepPlan, clients: dict[str, Client], *, fails: bool, ahead: bool = False) -> StepOutput | None:
        """One step; None when it fails as a whole."""
        self.write(plan, clients, fails=fails)
        if fails:
            return None
        tokens: dict[str, SampledToken] = {}
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        for share in plan.sequences:
            content = self.read(share, clients[share.request_id])
            if share.needs_prompt_logprobs:
                stop = min(share.end, share.num_prompt_tokens - 1)
                prompt_logprobs[share.request_id] = [_logprobs_of(share.token_ids[row + 1]) for row in range(share.start, stop)]
            if self._rng.random() < self._scenario.sampler_error_rate:
                if self._rng.random() < 0.8:
                    tokens[share.request_id] = SampledToken(token_id=0, error="poisoned")
                continue  # else forgotten: an error too, if a token was due
            if share.num_drafts:
                tokens[share.request_id] = self.verified(share, clients[share.request_id])
            elif share.samples or ahead:
                tokens[share.request_id] = SampledToken(token_id=next_token(content, share.sampling.seed or 0))
        return StepOutput(step=plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs)

    def verified(self, share: ScheduledSequence, client: Client) -> SampledToken:
        """The tokens behind the last known one and behind each guess that is right."""
        known, seed, chain = len(share.token_ids) - share.num_drafts, share.sampling.seed or 0, self.identities(share, client)
        chosen = [next_token(chain[known - 1], seed)]
        while len(chosen) <= share.num_drafts and chosen[-1] == share.token_ids[known + len(chosen) - 1]:
            chosen.append(next_token(chain[known + len(chosen) - 1], seed))
        self._totals.accepted += len(chosen) - 1
        return SampledToken(token_id=chosen[0], more=tuple(SampledToken(token_id=token) for token in chosen[1:]))


def _logprobs_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=-1.0, rank=1, top=[])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SimulationError(message)


class KnowingDrafter(NgramDrafter):
    """Guesses what each client must get, with errors now and then."""

    def __init__(self, config: SpeculationConfig, episode: Episode) -> None:
        super().__init__(config)
        self._episode = episode

    def propose(self, request_id: str, token_ids: list[int], limit: int) -> list[int]:
        super().propose(request_id, token_ids, limit)
        client, rng = self._episode.clients[request_id], self._episode.guesses
        known = [*client.request.prompt_token_ids, *client.outputs][len(token_ids) :]
        guesses = known + [rng.randrange(VOCABULARY) for _ in range(3)]
        wrong = rng.random() < 0.5
        return [
            token if not wrong or rng.random() < 0.8 else rng.randrange(VOCABULARY)
            for token in guesses[: rng.randint(0, min(limit, self.config.num_speculative_tokens))]
        ]


class Episode:
    """One configuration with its crowd, from empty to empty."""

    def __init__(self, seed: str, totals: Totals) -> None:
        self.rng = random.Random(seed)
        self.guesses = random.Random(f"{seed} guesses")  # of its own: without guesses, lives are the same as before there were any
        self.scenario = draw_scenario(self.rng, self.guesses)
        self.totals = totals
        config = self.scenario.config
        groups = [KVGroup(layers=[index], window=window) for index, window in enumerate(self.scenario.windows)]
        facts = KVFacts(
            block_size=config.block_size, dtype="float32", num_kv_heads=[1] * len(groups), head_dim=[8] * len(groups), groups=groups
        )
        self.scheduler = Scheduler(config, facts, clock=lambda: 0.0, secret=b"simulation")
        if config.speculation is not None and self.scenario.knowing_drafter:
            self.scheduler._drafter = KnowingDrafter(config.speculation, self)
        self.runner = FakeRunner(self.scenario, self.rng, totals)
        self.clients: dict[str, Client] = {}  # live ones
        self.chances = random.Random(f"{seed} ahead")  # of its own, as the guesses'
        self.looking_ahead = self.chances.random() < 0.5
        self._ahead: StepOutput | None = None  # of the second step in flight
        self.num_arrived = 0
        self.step = 0
        self._prefixes = [self._tokens(self.rng.randint(1, config.max_model_len)) for _ in range(3)]

    def run(self) -> None:
        """Run until all requests have arrived and ended."""
        rng, scenario = self.rng, self.scenario
        while self.num_arrived < scenario.num_requests or self.clients:
            while self.num_arrived < scenario.num_requests and (rng.random() < scenario.arrival_rate or not self.clients):
                self._arrive()
            self._maybe_abort()
            if rng.random() < scenario.cache_reset_rate:
                self.scheduler.reset_prefix_cache()
            self.scheduler.check()
            if self.scheduler.has_work() or self._ahead is not None:
                self._one_step()
        stats = self.scheduler.stats()
        _require(stats.kv_blocks_used == 0, f"{stats.kv_blocks_used} blocks are held after the last request")
        _require(not self.scheduler.has_work(), "the scheduler has work though every request ended")
        self.totals.preemptions += stats.num_preemptions
        self.totals.cached_tokens += stats.prefix_hits_tokens
        self.totals.episodes += 1

    def _look_ahead(self) -> None:
        """Plan and compute the next step before the tokens of the one in flight are committed."""
        plan = self.scheduler.plan_ahead()
        self.scheduler.check()
        if plan is None:
            return
        self.runner.check(plan, self.clients, ahead=True)
        self._ahead = self.runner.run(plan, self.clients, fails=False, ahead=True)
        self.totals.steps_ahead += 1

    def _one_step(self) -> None:
        scheduler, rng = self.scheduler, self.rng
        self.step += 1
        self.totals.steps += 1
        if self._ahead is None:
            plan = scheduler.plan()
            scheduler.check()
            self.runner.check(plan, self.clients)
            output = self.runner.run(plan, self.clients, fails=rng.random() < self.scenario.step_failure_rate)
        else:
            output, self._ahead = self._ahead, None
        if output is not None and self.looking_ahead and self.chances.random() < 0.9:
            self._look_ahead()
        if rng.random() < 0.1:  # while the step is in flight
            self._maybe_abort()
            if self.num_arrived < self.scenario.num_requests:
                self._arrive()
            scheduler.check()
        if output is None:
            events, self._ahead = scheduler.fail_all("the step failed"), None
        else:
            events = scheduler.commit(output)
        self._receive(events)
        scheduler.check()
        late = next((c for c in self.clients.values() if self.step > c.deadline_step), None)
        _require(late is None, f"{late.request.request_id if late else ''} did not end within its bound of steps")

    def _arrive(self) -> None:
        """Offer one request; now and then one that must be refused."""
        rng, config = self.rng, self.scenario.config
        request = self._request(f"r{self.num_arrived}")
        self.num_arrived += 1
        self.totals.requests += 1
        try:
            self.scheduler.add(request)
        except RequestRejected as error:
            room = min(config.max_model_len, self.scheduler.max_sequence_tokens) - len(request.prompt_token_ids)
            fits = room >= 1 and (request.sampling.max_tokens is None or request.sampling.max_tokens <= room)
            fits = fits and (config.enable_chunked_prefill or len(request.prompt_token_ids) <= config.max_num_batched_tokens)
            _require(error.status == 429 or not fits, f"{request.request_id} was refused without need: {error}")
            self.totals.rejections += 1
            return
        client = make_client(request, config, self.scheduler.max_sequence_tokens)
        self.clients[request.request_id] = client
        self._set_deadlines(client)
        if rng.random() < 0.02:
            try:
                self.scheduler.add(request)
            except RequestRejected:
                return
            raise SimulationError(f"{request.request_id} was accepted twice")

    def _set_deadlines(self, newcomer: Client) -> None:
        """Steps within which a request must end: the best ranked running one computes at least one token in each.

        A newcomer waits for all that are there at most. Those it goes before, by priority or, at the same arrival, by id, wait
        for one more. Twice the sequence's length leaves room for prompts computed again and for copies that wait a step.
        """
        config = self.scenario.config
        per_request = 2 * self.scheduler.max_sequence_tokens + 4
        newcomer.deadline_step = self.step + per_request * len(self.clients)
        rank = rank_of(newcomer.request, config.policy)
        for client in self.clients.values():
            if rank_of(client.request, config.policy) > rank:
                client.deadline_step += per_request

    def _maybe_abort(self) -> None:
        rng = self.rng
        if self.clients and rng.random() < self.scenario.abort_rate:
            request_id = rng.choice(list(self.clients))
            events = self.scheduler.abort(request_id, rng.choice(("abort", "stop")))
            _require(len(events) == 1 and events[0].finish_reason in ("abort", "stop"), f"{request_id} was aborted with {events}")
            _require(self.scheduler.abort(request_id) == [], f"{request_id} was aborted twice")
            self.clients.pop(request_id).ended = "abort"
            self.totals.aborts += 1

    def _receive(self, events: list[TokenEvent]) -> None:
        """Compare events with what each client must get."""
        for event in events:
            client = self.clients.get(event.request_id)
            _require(client is not None, f"{event.request_id} got an event after its end")
            assert client is not None
            first = not client.received
            client.received.extend(event.token_ids)
            self.totals.tokens += len(event.token_ids)
            count = len(client.received)
            _require(client.received == client.outputs[:count], f"{event.request_id} got {client.received}, not {client.outputs}")
            if first and event.token_ids and client.request.sampling.prompt_logprobs is not None:
                found = [None if entry is None else entry.token_id for entry in event.prompt_logprobs or []]
                _require(found == [None, *client.request.prompt_token_ids[1:]], f"{event.request_id}: prompt log-probabilities of {found}")
                _require(event.num_cached_tokens == 0, f"{event.request_id} skipped rows whose log-probabilities were asked for")
            if event.finish_reason is None:
                _require(count < len(client.outputs), f"{event.request_id} goes on after its end")
                continue
            client.ended = event.finish_reason
            del self.clients[event.request_id]
            if event.finish_reason == "error":
                self.totals.errors += 1
                continue
            _require(
                event.finish_reason == client.finish_reason and count == len(client.outputs),
                f"{event.request_id} ended with {event.finish_reason} after {count} tokens, "
                f"not {client.finish_reason} after {len(client.outputs)}",
            )

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, VOCABULARY) for _ in range(count)]

    def _request(self, request_id: str) -> GenerateRequest:
        rng = self.rng
        longest = self.scheduler.max_sequence_tokens
        prefix = rng.choice(self._prefixes)
        prompt = prefix[: rng.randint(1, len(prefix))] if rng.random() < 0.7 else []
        prompt = prompt + self._tokens(rng.randint(0 if prompt else 1, 6))
        if rng.random() < 0.95:
            prompt = prompt[: max(1, longest - rng.randint(1, 12))]
        room = max(1, longest - len(prompt))
        max_tokens = rng.choice((None, 1, rng.randint(1, room), rng.randint(1, room), room + rng.randint(0, 2)))
        return GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=max_tokens,
                seed=rng.randrange(3),
                ignore_eos=rng.random() < 0.5,
                min_tokens=rng.choice((0, 0, 1, 4)) if max_tokens is None or max_tokens >= 4 else 0,
                stop_token_ids=[rng.randrange(VOCABULARY)] if rng.random() < 0.2 else None,
                prompt_logprobs=0 if rng.random() < 0.05 else None,
            ),
            priority=rng.randrange(-2, 3),
            arrival_time=float(self.step),  # several a step: ties go by id
            cache_salt=rng.choice(("", "", "", "tenant")),
        )


def draw_scenario(rng: random.Random, guesses: random.Random) -> Scenario:
    """A configuration, mostly small enough that sequences fight for blocks."""
    block_size = rng.choice((1, 2, 3, 4, 4, 8))
    windows = rng.choice(((0,), (0,), (0,), (0, 5), (0, 1), (3,), (0, 4, 9), (2, 7)))
    max_model_len = rng.randint(8, 48)
    max_num_seqs = rng.randint(1, 8)
    max_num_batched_tokens = max_num_seqs + rng.randint(0, 24)
    per_sequence = -(-max_model_len // block_size) * len(windows)
    num_blocks = max(2, round(per_sequence * rng.choice((0.6, 1.0, 1.3, 2.0, 3.0, 6.0))))
    chunked = rng.random() < 0.75
    config = SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        policy=rng.choice(("fcfs", "priority")),
        enable_chunked_prefill=chunked,
        enable_prefix_caching=rng.random() < 0.8,
        long_prefill_token_threshold=rng.choice((0, 0, 0, 3)) if chunked else 0,
        max_num_partial_prefills=rng.choice((1, 1, 2, 8)),
        reserve_blocks=rng.choice((0, 0, 1, min(3, num_blocks - 1))),
        max_queue=rng.choice((2, 8, 100)),
        eos_token_ids=frozenset({EOS}),
        speculation=guesses.choice((None, None, SpeculationConfig(num_speculative_tokens=guesses.randint(1, 6), prompt_lookup_min=1))),
    )
    rough = rng.random() < 0.3
    return Scenario(
        config=config,
        windows=windows,
        num_requests=rng.randint(5, 60),
        arrival_rate=rng.choice((0.05, 0.2, 0.5, 0.9)),
        abort_rate=rng.choice((0.0, 0.02, 0.1)),
        sampler_error_rate=0.02 if rough else 0.0,
        step_failure_rate=0.01 if rough else 0.0,
        cache_reset_rate=0.01 if rough else 0.0,
        knowing_drafter=guesses.random() < 0.7,
    )


def simulate(num_steps: int, *, seed: int, first_episode: int = 0, num_episodes: int | None = None) -> Totals:
    """Run whole episodes until at least `num_steps` steps were simulated, or `num_episodes` episodes.

    Raises:
        SimulationError: an invariant does not hold; says how to repeat the episode.
    """
    totals = Totals()
    for episode in _count(first_episode, num_episodes):
        if totals.steps >= num_steps:
            break
        try:
            Episode(f"{seed}:{episode}", totals).run()
        except (SimulationError, LlmcError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise SimulationError(
                f"{type(error).__name__}: {error}; repeat with: python -m tests.runtime.simulation --seed {seed} --episode {episode}"
            ) from error
    return totals


def _count(first: int, number: int | None) -> Iterator[int]:
    episode = first
    while number is None or episode < first + number:
        yield episode
        episode += 1


def main() -> int:
    """Command line: prints what happened as JSON; exit code 1 on a broken invariant."""
    parser = argparse.ArgumentParser(description="simulate the scheduler and recount every invariant after every step")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", type=int, help="run this episode alone")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        if arguments.episode is None:
            totals = simulate(arguments.steps, seed=arguments.seed)
        else:
            totals = simulate(sys.maxsize, seed=arguments.seed, first_episode=arguments.episode, num_episodes=1)
    except SimulationError as error:
        print(error, file=sys.stderr)
        if arguments.episode is not None:
            raise
        return 1
    print(json.dumps({"seed": arguments.seed, "seconds": round(time.monotonic() - started, 1), **vars(totals)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
