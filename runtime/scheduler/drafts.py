"""Speculative decoding: its settings, and guesses by prompt lookup (what followed the last time the sequence said this follows again).

A step computes a sequence's newest token and the guesses behind it; the sampler then chooses the token after each in turn, with the
very draws it would have made in steps of one token, and stops at the first that differs from the guess. So guesses decide how many
tokens a step gives and never which. The idea: "prompt lookup decoding" (Saxena, 2023); checking guesses in one step: Leviathan et al.
2022, arXiv:2211.17192.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.errors import ConfigError

if TYPE_CHECKING:
    from llmc.runtime.scheduler.request import Sequence

MAX_SPECULATIVE_TOKENS = 64
_MAX_NGRAM = 32
_MAX_CANDIDATES = 16  # earlier places compared; more would cost every step of a repetitive text
_KEYS = {
    "ngram": ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"),
    "draft_model": ("method", "num_speculative_tokens", "model"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftModelConfig:
    """How many tokens are guessed, by which smaller model.

    Raises:
        ConfigError: a value is out of range.
    """

    num_speculative_tokens: int  # most guesses in one step
    model: str  # folder of the draft's artifact

    def __post_init__(self) -> None:
        _check_number("num_speculative_tokens", self.num_speculative_tokens, MAX_SPECULATIVE_TOKENS)
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"speculative_config: model is {self.model!r}; the folder of the draft's artifact is expected")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationConfig:
    """How many tokens are guessed by prompt lookup, from how long a repetition.

    Raises:
        ConfigError: a value is out of range or two disagree.
    """

    num_speculative_tokens: int  # most guesses in one step
    prompt_lookup_max: int = 5  # the longest run of last tokens that is looked for
    prompt_lookup_min: int = 2  # and the shortest

    def __post_init__(self) -> None:
        for name, most in (
            ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS),
            ("prompt_lookup_max", _MAX_NGRAM),
            ("prompt_lookup_min", _MAX_NGRAM),
        ):
            _check_number(name, getattr(self, name), most)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min={self.prompt_lookup_min} is above prompt_lookup_max={self.prompt_lookup_max}"
            )


def speculation_config(given: Mapping[str, Any]) -> SpeculationConfig | DraftModelConfig:
    """What `--speculative-config` holds, checked. A `model` without a method is a draft model, as in vLLM.

    Raises:
        ConfigError: another method, or a key that is unknown, missing or out of range.
    """
    method = given.get("method") or ("draft_model" if given.get("model") is not None else None)
    keys = _KEYS.get(method) if isinstance(method, str) else None
    if keys is None:
        raise ConfigError(
            f'speculative_config: method {method!r} is not built; accepted: "ngram" (guesses from the text so far), '
            '"draft_model" (guesses of a smaller model\'s artifact, named by model)'
        )
    unknown = sorted(set(given) - set(keys))
    if unknown:
        raise ConfigError(f"speculative_config: {unknown[0]!r} is unknown for method {method}; accepted: {', '.join(keys)}")
    if "num_speculative_tokens" not in given:
        raise ConfigError(
            f"speculative_config: num_speculative_tokens is missing; an integer from 1 to {MAX_SPECULATIVE_TOKENS} is expected"
        )
    if method == "draft_model":
        return DraftModelConfig(num_speculative_tokens=given["num_speculative_tokens"], model=given.get("model") or "")
    fields = {name: given[name] for name in keys[1:] if given.get(name) is not None}
    if "prompt_lookup_max" in fields and "prompt_lookup_min" not in fields and type(fields["prompt_lookup_max"]) is int:
        fields["prompt_lookup_min"] = max(1, min(2, fields["prompt_lookup_max"]))
    return SpeculationConfig(**fields)


def _check_number(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"speculative_config: {name} is {value!r}; an integer from 1 to {most} is expected")


@dataclass(slots=True)
class _Places:
    """Where runs of `prompt_lookup_min` tokens stood in one sequence: run -> positions behind it, in order."""

    behind: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    num_seen: int = 0  # tokens that are some run's next one


class NgramDrafter:
    """Guesses for all sequences of a scheduler. Keeps, per sequence, one position for each of its tokens."""

    def __init__(self, config: SpeculationConfig) -> None:
        self.config = config
        self._places: dict[str, _Places] = {}

    def propose_all(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """Guesses for each of `sequences`, at most its limit."""
        return [self.propose(one.request_id, one.token_ids, limit) for one, limit in zip(sequences, limits, strict=True)]

    def propose(self, request_id: str, token_ids: list[int], limit: int) -> list[int]:
        """At most `limit` guesses of what follows `token_ids`; none where the last tokens are new. Takes new tokens in.

        Of the earlier places with the longest agreement the most recent is taken.
        """
        shortest = self.config.prompt_lookup_min
        places = self._places.setdefault(request_id, _Places(num_seen=shortest))
        for position in range(places.num_seen, len(token_ids)):
            places.behind.setdefault(tuple(token_ids[position - shortest : position]), []).append(position)
        places.num_seen = max(places.num_seen, len(token_ids))
        best, longest = 0, 0
        for position in reversed(places.behind.get(tuple(token_ids[-shortest:]), [])[-_MAX_CANDIDATES:]):
            agreed = self._agreement(token_ids, position)
            if agreed > longest:
                best, longest = position, agreed
            if longest == self.config.prompt_lookup_max:
                break
        return token_ids[best : best + min(limit, self.config.num_speculative_tokens)] if longest else []

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence; unknown ids had nothing kept."""
        self._places.pop(request_id, None)

    def check(self, live: set[str]) -> bool:
        """Whether nothing is kept of a sequence that has ended. Asks."""
        return self._places.keys() <= live

    def _agreement(self, token_ids: list[int], position: int) -> int:
        """How many tokens before `position` equal the last ones, up to prompt_lookup_max."""
        count = self.config.prompt_lookup_min
        most = min(self.config.prompt_lookup_max, position)
        while count < most and token_ids[position - 1 - count] == token_ids[-1 - count]:
            count += 1
        return count
