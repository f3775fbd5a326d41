"""Canary prompts: the captured graph, run as it was captured, says what a served artifact must answer.

The reference is the graph before any pass, over torch, with the checkpoint's weights mapped from disk one tensor at a time: no
copy of the model is held. The artifact carries prompt, expected tokens, the margin of each choice and, where that is within what
rounding can move, every token that comes as close: the artifact may choose any of them, and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from llmc.artifacts.kv_bytes import cache_shape
from llmc.artifacts.manifest import Canary, KVFacts
from llmc.compiler.capture import TracedModel

PROMPT_LENGTHS = (12, 7)  # two sequences in one batch, unequal, neither a whole block
NEW_TOKENS = 8

# Difference between the two best logits below which a lowered program may choose the other: bfloat16 keeps 8 bits of
# logits near 20, and hundreds of roundings stand between the weights and them.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
MOST_CLOSE = 64  # tokens that may be the best; where more come as close, the step says little and is not compared

# name of a graph constant -> its tensor, real, in the dtype the graph says
FetchConstant = Callable[[str], Tensor]


class Reference(fx.Interpreter):
    """Runs the captured graph; constants are fetched when they are read and dropped when nothing reads them any more."""

    def __init__(self, graph: fx.GraphModule, fetch: FetchConstant) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._fetch = fetch

    def fetch_attr(self, target: str) -> Tensor:
        return self._fetch(target)

    def logits(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of one step."""
        result = self.run(*inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)


def prompts(vocab_size: int, encode: Callable[[str], list[int]] | None) -> list[list[int]]:
    """The canary prompts: a sentence where there is a tokenizer, else ids from a fixed sequence.

    Args:
        vocab_size: width of the logits; every id is below it.
        encode: text to token ids, or None.
    """
    texts = ("def fibonacci(n):\n    if n < 2:\n        return n\n    return", "The capital of France is the city of")
    result = []
    for row, length in enumerate(PROMPT_LENGTHS):
        ids = [i for i in encode(texts[row]) if i < vocab_size][:length] if encode is not None else []
        result.append(ids + spread_ids(vocab_size, length - len(ids), first=len(ids) + 1 + 97 * row))
    return result


def spread_ids(vocab_size: int, count: int, first: int = 1) -> list[int]:
    """A fixed sequence of ids; Knuth's multiplicative constant spreads them over the vocabulary."""
    return [(2654435761 * (first + i)) % vocab_size for i in range(count)]


def make_canaries(traced: TracedModel, fetch: FetchConstant, token_prompts: list[list[int]], tolerance: float) -> list[Canary]:
    """Greedy continuations of `token_prompts` by the reference, and at each step the tokens within `tolerance` of the best.

    All prompts run as one batch: first their prompts, then one token each, through the paged cache as a server would.
    """
    reference = Reference(traced.graph, fetch)
    block_size = traced.kv.block_size
    blocks_each = -(-(max(map(len, token_prompts)) + NEW_TOKENS) // block_size)
    caches = empty_caches(traced.kv, 1 + blocks_each * len(token_prompts))
    sequences = [list(p) for p in token_prompts]
    margins: list[list[float]] = [[] for _ in sequences]
    close: list[list[list[int]]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            inputs = step_inputs(sequences, done, block_size, blocks_each, len(traced.kv.groups))
            (logits,) = reference.logits(*inputs, *caches)
            best = logits.float().topk(2, dim=-1)
            for row, sequence in enumerate(sequences):
                done[row] = len(sequence)
                sequence.append(int(best.indices[row, 0]))
                margins[row].append(round(float(best.values[row, 0] - best.values[row, 1]), 6))
                close[row].append(close_tokens(logits[row].float(), tolerance))
    return [
        Canary(prompt_token_ids=prompt, expected_token_ids=sequence[len(prompt) :], margins=margin, close_token_ids=near)
        for prompt, sequence, margin, near in zip(token_prompts, sequences, margins, close, strict=True)
    ]


def close_tokens(logits: Tensor, tolerance: float) -> list[int]:
    """Ids whose logit lies within `tolerance` of the best, rising, the best among them; none if they are more than MOST_CLOSE.

    Args:
        logits: float32 [vocab_size].
    """
    ids: list[int] = (logits.max() - logits <= tolerance).nonzero().flatten().tolist()
    return ids if len(ids) <= MOST_CLOSE else []


def empty_caches(kv: KVFacts, num_blocks: int) -> list[Tensor]:
    """K and V of every layer, zeros, in the graph's order."""
    dtype: torch.dtype = getattr(torch, kv.dtype)
    shapes = [cache_shape(kv, layer, num_blocks) for layer in range(len(kv.head_dim))]
    return [torch.zeros(shape, dtype=dtype) for shape in shapes for _ in ("k", "v")]


def step_inputs(
    sequences: list[list[int]], done: list[int], block_size: int, blocks_each: int, num_groups: int, *, every_row: bool = False
) -> list[Tensor]:
    """The step's inputs, in the graph's order. Sequence b owns blocks [1 + b * blocks_each, 1 + (b + 1) * blocks_each).

    Args:
        done: tokens of each sequence that are in the cache already.
        every_row: logits of every token instead of each sequence's last.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    starts = [0]
    for row, (sequence, start) in enumerate(zip(sequences, done, strict=True)):
        for position in range(start, len(sequence)):
            ids.append(sequence[position])
            positions.append(position)
            slots.append((1 + row * blocks_each) * block_size + position)
        starts.append(len(ids))
        last_rows.append(len(ids) - 1)
    tables = [[1 + row * blocks_each + block for block in range(blocks_each)] for row in range(len(sequences))]
    return [
        torch.tensor(ids),
        torch.tensor(positions),
        torch.arange(len(ids)) if every_row else torch.tensor(last_rows),
        torch.tensor([slots] * num_groups),
        torch.tensor([tables] * num_groups, dtype=torch.int32),
        torch.tensor([len(s) for s in sequences], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
    ]


def checked_positions(canaries: list[Canary]) -> Mapping[str, int]:
    """How many expected tokens are compared, how many of these with others as close, how many are too close to call; for the report."""
    steps = [close for canary in canaries for close in canary.close_token_ids or ()]
    return {
        "compared": sum(len(close) > 0 for close in steps),
        "among_close": sum(len(close) > 1 for close in steps),
        "too_close": sum(not close for close in steps),
    }
