"""A scheduler with a runner that gives canned tokens, for tests that look at single decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmc.artifacts.manifest import KVFacts, KVGroup
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent, TokenLogprobs
from llmc.runtime.scheduler import Scheduler, SchedulerConfig
from llmc.runtime.step import SampledToken, StepOutput, StepPlan

EOS = 99


def make_scheduler(*, windows: tuple[int, ...] = (0,), **changes: object) -> Scheduler:
    """A scheduler of 4 sequences, 16 tokens a step, 64 blocks of 4 tokens; `changes` are SchedulerConfig fields."""
    settings: dict[str, object] = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 64,
        "reserve_blocks": 0,
        "eos_token_ids": frozenset({EOS}),
    }
    config = SchedulerConfig(**{**settings, **changes})  # type: ignore[arg-type]
    groups = [KVGroup(layers=[index], window=window) for index, window in enumerate(windows)]
    facts = KVFacts(
        block_size=config.block_size, dtype="float32", num_kv_heads=[1] * len(groups), head_dim=[8] * len(groups), groups=groups
    )
    return Scheduler(config, facts, clock=lambda: 12.5, secret=b"test")


def request(
    name: str, prompt: int | list[int] = 4, *, arrival: float = 0.0, priority: int = 0, salt: str = "", **sampling: object
) -> GenerateRequest:
    """A request; an int prompt is that many tokens nobody else has."""
    tokens = [1000 + 37 * sum(name.encode()) + index for index in range(prompt)] if isinstance(prompt, int) else prompt
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        priority=priority,
        arrival_time=arrival,
        cache_salt=salt,
    )


def shares(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """Who computes what: request id -> [start, end)."""
    return {share.request_id: (share.start, share.end) for share in plan.sequences}


def output_for(plan: StepPlan, tokens: Mapping[str, int] | Callable[[str, int], int] | None = None) -> StepOutput:
    """Token 7 for each sequence that samples, or what `tokens` says (by id, or a function of id and length)."""
    sampled = {}
    for share in plan.sequences:
        if share.samples:
            token = tokens(share.request_id, share.end) if callable(tokens) else (tokens or {}).get(share.request_id, 7)
            sampled[share.request_id] = SampledToken(token_id=token)
    logprobs = {
        share.request_id: [
            TokenLogprobs(token_id=share.token_ids[row + 1], logprob=-1.0, rank=1, top=[])
            for row in range(share.start, min(share.end, share.num_prompt_tokens - 1))
        ]
        for share in plan.sequences
        if share.needs_prompt_logprobs
    }
    return StepOutput(step=plan.step, tokens=sampled, prompt_logprobs=logprobs)


def step(scheduler: Scheduler, tokens: Mapping[str, int] | Callable[[str, int], int] | None = None) -> tuple[StepPlan, list[TokenEvent]]:
    """Plan, run, commit and recount."""
    plan = scheduler.plan()
    scheduler.check()
    output = output_for(plan, tokens)
    seen = StepPlan(step=plan.step, sequences=list(plan.sequences))
    events = scheduler.commit(output)
    scheduler.check()
    return seen, events


def finish(
    scheduler: Scheduler, tokens: Mapping[str, int] | Callable[[str, int], int] | None = None, *, limit: int = 1000
) -> dict[str, list[TokenEvent]]:
    """Run until nothing is left; events by request id."""
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(limit):
        if not scheduler.has_work():
            return events
        for event in step(scheduler, tokens)[1]:
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError(f"work is left after {limit} steps")
