"""Sampling where the logits are: what each row of a step wants, as numbers that executors which can do it take.

Decided per step and in the open: `rows_on_device` says None where one row wants what these numbers cannot say, and the step's logits then
come to the host, whose sampler knows everything. Both choose the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from llmc.runtime.messages import SamplingParams, TokenLogprobs
from llmc.runtime.step import DeviceBatch, Executor, SampledToken

Kind = Literal["check", "draw", "truncate", "full"]
NO_LOGITS = "the model gave no usable logits for this sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLimits:
    """What an executor's sampling of kind "full" holds per row; 0: it has none."""

    vocab: int
    num_touched: int  # tokens that a bias or penalty may touch
    num_top: int  # log-probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWish:
    """What one row wants. Made by the sampler from what it keeps of a sequence.

    touched: (ids, bias, counts of the output or -1 without penalties), each [P]. mask: bool [V], or None.
    awaits: what it wants depends on the sequence's own last token, so that the host must know that one first.
    """

    params: SamplingParams
    greedy: bool
    seed: int
    draw: int  # how many tokens were drawn before
    mask: np.ndarray | None = None
    touched: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    awaits: bool = False

    @property
    def modified(self) -> bool:
        """Whether anything changes the logits before the choice."""
        return self.mask is not None or self.touched is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """The rows of a step by input name, each array [N, ...] as docs/plan_format.md, "Sampling", has it.

    kind "check" takes each row's largest logit and has no inputs. modified: of each row, whether something changes its logits.
    can_follow: nothing depends on a token of this step, so the next step can be started before the host knows them.
    """

    kind: Kind
    inputs: dict[str, np.ndarray]
    num_top: tuple[int | None, ...]  # of each row, log-probabilities asked for; None: none, not even the token's own
    modified: tuple[bool, ...]
    can_follow: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRows:
    """What came back. tokens: int64 [N], -1 for a row that could not be sampled. likely: (logprobs, ranks, top_ids, top_logprobs)."""

    tokens: np.ndarray
    likely: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fed:
    """`count` tokens of the step started last, from row `row`, are the input tokens of this one from `token`."""

    row: int
    token: int
    count: int


class SamplingExecutor(Executor, Protocol):
    """An `Executor` that can choose tokens where the logits are, and begin a step while another one runs."""

    sampling_limits: DeviceLimits

    def start(self, batch: DeviceBatch, sampling: RowSampling, fed: Sequence[Fed]) -> bool:
        """Begin a step. At most two may be begun and not finished; `fed` names what the second takes from the first.

        Returns: False, and nothing has begun, if this step's sampling is not held by any plan.
        """

    def finish(self) -> SampledRows:
        """Wait for the oldest step that was begun. Valid until the second `start` from now."""

    def abandon(self) -> None:
        """Wait for all steps that were begun, and drop them."""


def rows_on_device(wishes: Sequence[RowWish], limits: DeviceLimits) -> RowSampling | None:
    """Put the rows of a step into one form; None if some row's wish does not fit."""
    params = [wish.params for wish in wishes]
    num_top = tuple(p.logprobs for p in params)
    modified = tuple(wish.modified for wish in wishes)
    likely = any(top is not None for top in num_top)
    kind: Kind = "check"
    if likely or any(modified):
        kind = "full"
    elif any(_truncates(p, limits.vocab) for p, wish in zip(params, wishes, strict=True) if not wish.greedy):
        kind = "truncate"
    elif not all(wish.greedy for wish in wishes):
        kind = "draw"
    if kind == "full" and not _fits(wishes, num_top, limits):
        return None
    inputs = _numbers(wishes) if kind != "check" else {}
    if kind == "full":
        inputs |= _changes(wishes, limits)
    can_follow = not any(modified) and not any(wish.awaits for wish in wishes)
    return RowSampling(kind=kind, inputs=inputs, num_top=num_top, modified=modified, can_follow=can_follow)


def sampled_token(rows: SampledRows, index: int, sampling: RowSampling) -> SampledToken | None:
    """One row's token; None where only the logits can tell why there is none."""
    token = int(rows.tokens[index])
    if token < 0:
        return None if sampling.modified[index] else SampledToken(token_id=-1, error=NO_LOGITS)
    asked = sampling.num_top[index]
    if asked is None or rows.likely is None:
        return SampledToken(token_id=token)
    logprobs, ranks, top_ids, top = (part[index] for part in rows.likely)
    pairs = list(zip(top_ids[:asked].tolist(), top[:asked].tolist(), strict=True))
    return SampledToken(token_id=token, logprobs=TokenLogprobs(token_id=token, logprob=float(logprobs), rank=int(ranks), top=pairs))


def merge_fed(pairs: Sequence[tuple[int, int]]) -> list[Fed]:
    """(row, token) pairs as the fewest runs of neighbours."""
    runs: list[Fed] = []
    for row, token in pairs:
        last = runs[-1] if runs else None
        if last is not None and (row, token) == (last.row + last.count, last.token + last.count):
            runs[-1] = Fed(row=last.row, token=last.token, count=last.count + 1)
        else:
            runs.append(Fed(row=row, token=token, count=1))
    return runs


def _truncates(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1.0


def _fits(wishes: Sequence[RowWish], num_top: Sequence[int | None], limits: DeviceLimits) -> bool:
    if max((top for top in num_top if top is not None), default=0) > limits.num_top:
        return False
    return all(wish.touched is None or len(wish.touched[0]) <= limits.num_touched for wish in wishes)


def _numbers(wishes: Sequence[RowWish]) -> dict[str, np.ndarray]:
    """How each row is drawn. Temperature and min-p in double precision, as the host's sampler has them."""
    params = [wish.params for wish in wishes]
    greedy = [wish.greedy for wish in wishes]
    gaps = [p.temperature * math.log(p.min_p) if p.min_p > 0.0 and not g else -math.inf for p, g in zip(params, greedy, strict=True)]
    return {
        "inverse_temperature": np.array([0.0 if g else 1.0 / p.temperature for p, g in zip(params, greedy, strict=True)], dtype=np.float32),
        "top_k": np.array([p.top_k if 0 < p.top_k < 2**31 else 0 for p in params], dtype=np.int32),
        "top_p": np.array([p.top_p for p in params], dtype=np.float64),
        "min_p_gap": np.array(gaps, dtype=np.float64),
        "seeds": np.array([wish.seed & (2**64 - 1) for wish in wishes], dtype=np.uint64).view(np.int64),
        "draws": np.array([wish.draw for wish in wishes], dtype=np.int64),
    }


def _changes(wishes: Sequence[RowWish], limits: DeviceLimits) -> dict[str, np.ndarray]:
    """What changes each row's logits; rows without a wish keep theirs bit for bit."""
    rows, words = len(wishes), -(-limits.vocab // 32)
    mask = np.full((rows, words), -1, dtype=np.int32)
    ids = np.full((rows, limits.num_touched), -1, dtype=np.int32)
    bias, counts = np.zeros(ids.shape, dtype=np.float32), np.full(ids.shape, -1, dtype=np.float32)
    penalties = np.tile(np.array([1.0, 0.0, 0.0], dtype=np.float32), (rows, 1))
    for row, wish in enumerate(wishes):
        if wish.mask is not None:
            bits = np.packbits(wish.mask, bitorder="little")
            mask[row].view(np.uint8)[: len(bits)] = bits
        if wish.touched is not None:
            number = len(wish.touched[0])
            ids[row, :number], bias[row, :number], counts[row, :number] = wish.touched
        params = wish.params
        penalties[row] = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return {"mask": mask, "touched_ids": ids, "touched_bias": bias, "touched_counts": counts, "penalties": penalties}
