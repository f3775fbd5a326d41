"""Sampling ops on a GPU, against reading the logits once and torch's sort-based sampling: python -m llmc.kernels.sample.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gpu_bench import DEVICE, Case, main, random

VOCAB = 151936


def arguments(rows: int, truncate: bool) -> tuple[Any, ...]:
    def all_rows(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    numbers = (all_rows(40, torch.int32), all_rows(0.9, torch.float64), all_rows(float("-inf"), torch.float64))
    seeds = torch.arange(rows, device=DEVICE)
    return (random(rows, VOCAB), all_rows(1.25, torch.float32), *numbers, seeds, seeds.clone(), truncate)


def logprob_arguments(rows: int) -> tuple[Any, ...]:
    return random(rows, VOCAB), torch.zeros(rows, dtype=torch.int64, device=DEVICE), 5


def torch_sample(logits: Tensor, inverse: Tensor, top_k: Tensor, top_p: Tensor, *rest: Any) -> Tensor:
    """temperature and, if asked for, top-k and top-p by a full sort, then Gumbel's way to draw."""
    scores = logits.float() * inverse[:, None]
    if rest[-1]:
        scores, order = scores.sort(dim=1, descending=True)
        place = torch.arange(scores.shape[1], device=scores.device)
        probabilities = scores.softmax(1)
        dropped = (place >= top_k[:, None]) | (probabilities.cumsum(1) - probabilities > top_p[:, None])
        scores = scores.masked_fill(dropped, float("-inf"))
    noise = torch.empty_like(scores).exponential_()
    best = (scores - noise.log()).argmax(1)
    return order.gather(1, best[:, None])[:, 0] if rest[-1] else best


def cases() -> Iterator[Case]:
    from .triton_impl import sample, token_logprobs

    for rows in (1, 16, 64, 256):
        for truncate in (False, True):
            yield Case(
                name=f"sample {'truncated ' if truncate else ''}{rows}x{VOCAB}",
                make=partial(arguments, rows, truncate),
                ours=sample,
                moved_bytes=rows * VOCAB * 2,
                baselines={"torch": torch_sample},
            )
        yield Case(
            name=f"token_logprobs {rows}x{VOCAB}",
            make=partial(logprob_arguments, rows),
            ours=token_logprobs,
            moved_bytes=rows * VOCAB * 2,
            baselines={"torch": lambda logits, ids, top: logits.float().log_softmax(1).topk(top)},
        )


if __name__ == "__main__":
    main(cases)
