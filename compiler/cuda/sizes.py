"""Which sizes of a step get a plan: decode steps by the number of sequences, all others by the number of tokens.

The defaults follow vLLM's rules for captured sizes: [1, 2, 4], every 8th up to 256, every 16th above, up to twice max_num_seqs and at
most 512; those above max_num_seqs are left out, since a decode step has one token per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.errors import ConfigError

_MAX_CAPTURED = 512
_FIRST_BUCKET = 64  # tokens; the smallest step that is no decode step, by default
MAX_SIZES = 512  # plans of an artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSize:
    """One plan's sizes. `decode`: every sequence has at most one token, so there are as many tokens as sequences."""

    decode: bool
    num_tokens: int
    num_seqs: int
    num_logits: int

    def __str__(self) -> str:
        return f"decode {self.num_seqs}" if self.decode else f"prefill {self.num_tokens}"


def plan_sizes(
    *,
    capture_sizes: Sequence[int] | None,
    max_capture_size: int | None,
    compile_sizes: Sequence[int] | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> list[PlanSize]:
    """Resolve the flags to sizes, decode first, each from small to large.

    Args:
        capture_sizes: --cudagraph-capture-sizes. max_capture_size: --max-cudagraph-capture-size.
        compile_sizes: --compile-sizes, tokens of steps that prefill; the largest step is always among them.

    Raises:
        ConfigError: sizes that disagree, or that no step has.
    """
    decode = _decode_sizes(capture_sizes, max_capture_size, max_num_seqs)
    prefill = _prefill_sizes(compile_sizes, max_num_batched_tokens)
    if len(decode) + len(prefill) > MAX_SIZES:
        raise ConfigError(
            f"{len(decode)} decode and {len(prefill)} prefill sizes; an artifact may have {MAX_SIZES} plans, give fewer sizes"
        )
    return [
        *(PlanSize(decode=True, num_tokens=size, num_seqs=size, num_logits=size) for size in decode),
        *(
            PlanSize(decode=False, num_tokens=size, num_seqs=min(size, max_num_seqs), num_logits=min(size, max_num_seqs))
            for size in prefill
        ),
    ]


def _decode_sizes(sizes: Sequence[int] | None, largest: int | None, max_num_seqs: int) -> list[int]:
    if sizes is None:
        most = min(2 * max_num_seqs, _MAX_CAPTURED) if largest is None else largest
        every = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
        return [size for size in every if size <= min(most, max_num_seqs)]
    if largest is not None and largest != max(sizes):
        raise ConfigError(
            f"--max-cudagraph-capture-size {largest} is not the largest of --cudagraph-capture-sizes, {max(sizes)}; leave one out"
        )
    if max(sizes) > max_num_seqs:
        raise ConfigError(
            f"--cudagraph-capture-sizes {max(sizes)} is above max_num_seqs={max_num_seqs}, and a decode step has one token per sequence; "
            "leave it out or raise --max-num-seqs"
        )
    return sorted(set(sizes))


def _prefill_sizes(sizes: Sequence[int] | None, max_num_batched_tokens: int) -> list[int]:
    if sizes is None:
        buckets = [_FIRST_BUCKET << n for n in range(32)]
        return sorted({*(size for size in buckets if size < max_num_batched_tokens), max_num_batched_tokens})
    if max(sizes) > max_num_batched_tokens:
        raise ConfigError(
            f"--compile-sizes {max(sizes)} is above max_num_batched_tokens={max_num_batched_tokens}, which no step exceeds; "
            "leave it out or raise --max-num-batched-tokens"
        )
    return sorted({*sizes, max_num_batched_tokens})
