"""From rows of logits to tokens. What a sequence wants is worked out once; a step then touches only that row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmc.runtime.device_sampling import RowWish
from llmc.runtime.messages import SamplingParams, TokenLogprobs
from llmc.runtime.sampler.choose import choose, choose_from_all
from llmc.runtime.sampler.logprobs import token_logprobs
from llmc.runtime.sampler.philox import uniform, uniforms
from llmc.runtime.sampler.token_counts import TokenCounts
from llmc.runtime.step import SampledToken, ScheduledSequence

_GREEDY_BELOW = 1e-5  # a lower temperature is greedy, as in vLLM
_DRAWS_AHEAD = 64  # made in a tenth of the time of as many single ones
_MAX_DRAWN = 1 << 18  # logits of rows drawn together: 1 MiB, which a core's own cache holds


@dataclass(slots=True)
class _SequenceState:
    """What the sampler keeps of one sequence between steps. The sampler owns and changes it."""

    seed: int
    plain_greedy: bool  # nothing but the argmax is asked for
    plain_draw: bool  # nothing but a draw from all tokens
    greedy: bool
    counts: TokenCounts | None
    bias_ids: np.ndarray | None
    bias: np.ndarray | None
    allowed: np.ndarray | None
    held_back: np.ndarray | None  # eos and stop ids, masked before min_tokens
    draws: list[float] = field(default_factory=list)  # made ahead, from position `first_draw`; plain draws alone use them
    first_draw: int = 0


class _Logits(Protocol):
    """Of `executors.logits.Logits` what is needed here."""

    def largest(self) -> list[int]: ...
    def to_float32(self) -> np.ndarray: ...


class Sampler:
    """Chooses one token per sampling sequence. Not thread-safe; lives in the engine's thread.

    Args:
        eos_token_ids: masked while an output is shorter than `min_tokens`.
        seed: base for sequences without a seed of their own; None draws each from the operating system.
    """

    def __init__(self, *, eos_token_ids: list[int], seed: int | None = None) -> None:
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self._num_unseeded = 0
        self._states: dict[str, _SequenceState] = {}

    def sample(self, logits: np.ndarray, sequence: ScheduledSequence, mask: np.ndarray | None = None) -> SampledToken:
        """Choose the next token of `sequence`.

        Args:
            logits: float32 [V], this sequence's row; changed in place when penalties or masks apply.
            mask: bool [V], the tokens its grammar allows; None: it has no grammar.

        Returns:
            The token, or one with `error` set when the row holds no finite maximum.
        """
        best = int(logits.argmax())  # the first of equals; the first NaN if there is one
        if not np.isfinite(logits[best]):
            return SampledToken(token_id=-1, error=f"the model gave no usable logits (maximum {logits[best]}) for this sequence")
        state = self._state(sequence)
        if state.plain_greedy and mask is None:
            return SampledToken(token_id=best)
        params = sequence.sampling
        modifies = mask is not None or _modifies(state, params)
        raw = logits if params.logprobs is None or not modifies else logits.copy()
        if modifies:
            self._modify(logits, state, sequence, mask)
            best = int(logits.argmax())
            if not np.isfinite(logits[best]):
                return SampledToken(token_id=-1, error="the request's masks and biases leave no token to choose", error_status=400)
        token = best if state.greedy else self._draw(logits, state, sequence)
        logprobs = None if params.logprobs is None else token_logprobs(raw, token, params.logprobs)
        return SampledToken(token_id=token, logprobs=logprobs)

    def plain(self, sequences: Sequence[ScheduledSequence], logits: _Logits) -> dict[str, SampledToken]:
        """The tokens of those that want the argmax, or a draw from all tokens, and nothing else: found together. Everyone else is left to
        `sample`.

        Args:
            logits: [N, V], one row per sequence in their order.

        Returns:
            request id -> the very token `sample` would choose.
        """
        states = [self._states.get(sequence.request_id) for sequence in sequences]
        if not any(state is not None and (state.plain_greedy or state.plain_draw) for state in states):
            return {}
        best = logits.largest()
        tokens = {
            sequence.request_id: SampledToken(token_id=token)
            for sequence, state, token in zip(sequences, states, best, strict=True)
            if state is not None and state.plain_greedy and token >= 0
        }
        if len(tokens) == len(sequences):
            return tokens
        drawing = [row for row, state in enumerate(states) if state is not None and state.plain_draw and best[row] >= 0]
        if drawing:
            wide = logits.to_float32()
            at_once = max(1, _MAX_DRAWN // wide.shape[1])
            for first in range(0, len(drawing), at_once):
                rows = drawing[first : first + at_once]
                sharing = [sequences[row] for row in rows]
                found = choose_from_all(
                    wide if len(rows) == len(wide) else wide[rows],
                    peaks=[wide.item(row, best[row]) for row in rows],
                    temperatures=[sequence.sampling.temperature for sequence in sharing],
                    draws=self._draws(sharing),
                )
                tokens.update({sequence.request_id: SampledToken(token_id=token) for sequence, token in zip(sharing, found, strict=True)})
        return tokens

    def wishes(self, sequences: Sequence[ScheduledSequence], vocab: int) -> list[RowWish]:
        """What each sequence's row wants, for an executor that samples itself. `end` counts: the last token may be unknown yet.

        Grammars are not among it. Changes what is kept of the sequences, as `sample` does.
        """
        return [self._wish(self._state(sequence), sequence, vocab) for sequence in sequences]

    def guesses(self, sequences: Sequence[ScheduledSequence], logits: np.ndarray) -> list[int]:
        """What `sample` would choose, were `logits` the model's: a draft model's guesses, with the very draws the model's token will
        have. Changes nothing but `logits`; penalties count the tokens up to the last one sampled.

        Args:
            logits: float32 [N, V], one row per sequence in their order.

        Returns:
            One token each; -1 where a row holds no finite maximum.
        """
        found: list[int] = logits.argmax(axis=1).tolist()
        for index, sequence in enumerate(sequences):
            row, state = logits[index], self._states.get(sequence.request_id)
            if state is not None and not state.plain_greedy and np.isfinite(row[found[index]]):
                if _modifies(state, sequence.sampling):
                    self._modify(row, state, sequence, None)
                    found[index] = int(row.argmax())
                if not state.greedy and np.isfinite(row[found[index]]):
                    found[index] = self._draw(row, state, sequence)
            if not np.isfinite(row[found[index]]):
                found[index] = -1
        return found

    def prompt_logprobs(self, rows: np.ndarray, next_token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that follow each of `rows` (float32 [R, V], raw)."""
        return [token_logprobs(row, token, num_top) for row, token in zip(rows, next_token_ids, strict=True)]

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a finished sequence; unknown ids had nothing kept."""
        self._states.pop(request_id, None)

    def _state(self, sequence: ScheduledSequence) -> _SequenceState:
        state = self._states.get(sequence.request_id)
        if state is None:
            state = self._states[sequence.request_id] = self._new_state(sequence)
        if state.counts is not None:
            state.counts.advance(sequence.token_ids)
        return state

    def _new_state(self, sequence: ScheduledSequence) -> _SequenceState:
        params = sequence.sampling
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        held_back = sorted({*self._eos_token_ids, *(params.stop_token_ids or [])}) if params.min_tokens > 0 else []
        bias = params.logit_bias or {}
        state = _SequenceState(
            seed=params.seed if params.seed is not None else self._unseeded(),
            plain_greedy=False,
            plain_draw=False,
            greedy=params.temperature < _GREEDY_BELOW,
            counts=TokenCounts(sequence.token_ids[: sequence.num_prompt_tokens]) if penalised else None,
            bias_ids=np.fromiter(bias.keys(), dtype=np.int64) if bias else None,
            bias=np.fromiter(bias.values(), dtype=np.float32) if bias else None,
            allowed=np.asarray(params.allowed_token_ids, dtype=np.int64) if params.allowed_token_ids is not None else None,
            held_back=np.asarray(held_back, dtype=np.int64) if held_back else None,
        )
        if params.logprobs is None and params.structured_outputs is None and not _modifies(state, params):
            state.plain_greedy = state.greedy
            state.plain_draw = not state.greedy and params.top_k < 1 and params.top_p >= 1.0 and params.min_p <= 0.0
        return state

    def _wish(self, state: _SequenceState, sequence: ScheduledSequence, vocab: int) -> RowWish:
        params, num_output = sequence.sampling, sequence.end - sequence.num_prompt_tokens
        if not _modifies(state, params):
            return RowWish(params=params, greedy=state.greedy, seed=state.seed, draw=num_output)
        held = state.held_back if num_output < params.min_tokens else None
        mask: np.ndarray | None = None
        if state.allowed is not None or params.bad_words_token_ids or held is not None:
            mask = np.ones(vocab, dtype=bool)
            if state.allowed is not None:
                mask[:] = False
                mask[state.allowed] = True
            mask[_bad_endings(sequence, num_output)] = False
            if held is not None:
                mask[held] = False
        return RowWish(
            params=params,
            greedy=state.greedy,
            seed=state.seed,
            draw=num_output,
            mask=mask,
            touched=_touched(state),
            awaits=state.counts is not None or bool(params.bad_words_token_ids),
        )

    def _unseeded(self) -> int:
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little")
        self._num_unseeded += 1
        return self._seed + (self._num_unseeded << 32)

    def _modify(self, row: np.ndarray, state: _SequenceState, sequence: ScheduledSequence, mask: np.ndarray | None) -> None:
        """Masks, bias and penalties, in vLLM's order. Changes `row`."""
        params = sequence.sampling
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        if mask is not None:
            row[~mask] = -np.inf
        if state.allowed is not None:
            kept = row[state.allowed]
            row.fill(-np.inf)
            row[state.allowed] = kept
        row[_bad_endings(sequence, num_output)] = -np.inf
        if state.held_back is not None and num_output < params.min_tokens:
            held = row[state.held_back]
            row[state.held_back] = -np.inf
            if mask is not None and row.max() == -np.inf:
                row[state.held_back] = held  # the document is complete and cannot go on
        if state.bias_ids is not None:
            row[state.bias_ids] += state.bias
        if state.counts is not None:
            _penalise(row, state.counts, params)

    def _draws(self, sequences: list[ScheduledSequence]) -> list[float]:
        """What `uniform` gives each sequence, of draws that are made together for some tokens to come."""
        drawn = [(self._states[sequence.request_id], _position(sequence)) for sequence in sequences]
        missing = [(state, position) for state, position in drawn if not 0 <= position - state.first_draw < len(state.draws)]
        if missing:
            ahead = uniforms([state.seed for state, _ in missing], [position for _, position in missing], _DRAWS_AHEAD)
            for (state, position), draws in zip(missing, ahead.tolist(), strict=True):
                state.draws, state.first_draw = draws, position
        return [state.draws[position - state.first_draw] for state, position in drawn]

    def _draw(self, row: np.ndarray, state: _SequenceState, sequence: ScheduledSequence) -> int:
        params = sequence.sampling
        return choose(
            row,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            draw=uniform(state.seed, _position(sequence)),
        )


def _position(sequence: ScheduledSequence) -> int:
    """How many tokens were drawn before, whatever the batch."""
    return len(sequence.token_ids) - sequence.num_prompt_tokens


def _modifies(state: _SequenceState, params: SamplingParams) -> bool:
    """Whether anything changes the logits before the choice."""
    kept = (state.counts, state.bias_ids, state.allowed, state.held_back)
    return any(part is not None for part in kept) or bool(params.bad_words_token_ids)


def _bad_endings(sequence: ScheduledSequence, num_output: int) -> list[int]:
    """The last tokens of the bad words whose other tokens have just been said."""
    token_ids = sequence.token_ids
    found = []
    for word in sequence.sampling.bad_words_token_ids or []:
        head = word[:-1]
        if len(head) <= num_output and token_ids[len(token_ids) - len(head) :] == head:
            found.append(word[-1])
    return found


def _touched(state: _SequenceState) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens that a bias or a penalty changes, each once: ids int64, bias and counts float32 [P]; count -1: no penalty."""
    counts, ids = state.counts, state.bias_ids
    if counts is None:
        if ids is None or state.bias is None:
            return None
        return ids, state.bias, np.full(len(ids), -1, dtype=np.float32)
    if ids is None or state.bias is None:
        return counts.ids, np.zeros(len(counts.ids), dtype=np.float32), counts.output_counts
    both = np.union1d(counts.ids, ids)
    bias, said = np.zeros(len(both), dtype=np.float32), np.full(len(both), -1, dtype=np.float32)
    bias[np.searchsorted(both, ids)] = state.bias
    said[np.searchsorted(both, counts.ids)] = counts.output_counts
    return both, bias, said


def _penalise(row: np.ndarray, counts: TokenCounts, params: SamplingParams) -> None:
    """Repetition over prompt and output, frequency and presence over output. Changes `row`."""
    ids, output = counts.ids, counts.output_counts
    values = row[ids]
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
    row[ids] = values - np.float32(params.frequency_penalty) * output - np.float32(params.presence_penalty) * (output > 0)
