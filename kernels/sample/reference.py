"""The meaning of the sampling ops in plain torch, and their fake rules. N rows, V vocabulary, P touched tokens of a row.

A row's token is the one that runtime/sampler chooses from the same row, seed and position: the same stream of random numbers, the same
order of min-p, top-k and top-p, the same ties. Nothing but the row and its own parameters decides it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE_SCHEMA = (
    "sample(Tensor logits, Tensor inverse_temperature, Tensor top_k, Tensor top_p, Tensor min_p_gap, Tensor seeds, Tensor positions, "
    "bool truncate) -> Tensor"
)
ADJUST_SCHEMA = "adjust_logits(Tensor logits, Tensor? mask, Tensor ids, Tensor bias, Tensor counts, Tensor penalties) -> Tensor"
LOGPROBS_SCHEMA = "token_logprobs(Tensor logits, Tensor token_ids, int num_top) -> (Tensor, Tensor, Tensor, Tensor)"
CHECKED_SCHEMA = "checked_tokens(Tensor logits, Tensor tokens) -> (Tensor, Tensor)"
GREEDY_BELOW = 1e-5  # a lower temperature is greedy
_MASK = 0xFFFFFFFF


def row_parameters(temperature: float, min_p: float) -> tuple[float, float]:
    """(inverse_temperature, min_p_gap) of a request, as `sample` takes them; worked out once, in double precision, on the host."""
    if temperature < GREEDY_BELOW:
        return 0.0, -math.inf
    return 1.0 / temperature, temperature * math.log(min_p) if min_p > 0.0 else -math.inf


def sample_reference(
    logits: Tensor, inverse_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p_gap: Tensor, seeds: Tensor, positions: Tensor,
    truncate: bool,
) -> Tensor:  # fmt: skip
    """Draw a token per row.

    Args:
        logits: [N, V] floating, after masks and penalties; computed on in fp32.
        inverse_temperature: float32 [N]; 0 takes the largest logit, of equals the lowest id.
        top_k: int32 [N]: keep the k largest, and what equals the k-th; outside 1..V-1 all.
        top_p: float64 [N]: keep the smallest set of likeliest tokens that holds so much probability; 1 and more all.
        min_p_gap: float64 [N]: keep logits of at least the row's largest plus this; -inf all.
        seeds, positions: int64 [N]: the draw is number `positions` of the stream `seeds` (Philox 4x32-10, 53 bits).
        truncate: whether any row has a top_k or top_p; where it is false the two are not read.

    Returns:
        int64 [N]; -1 for a row with a NaN or without a finite maximum.
    """
    check_sample(logits, inverse_temperature, top_k, top_p, min_p_gap, seeds, positions)
    rows = zip(
        logits.float(), inverse_temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p_gap.tolist(), seeds.tolist(),
        positions.tolist(), strict=True,
    )  # fmt: skip
    tokens = []
    for row, inverse, k, p, gap, seed, position in rows:
        tokens.append(_choose(row, inverse, k if truncate else 0, p if truncate else 1.0, gap, uniform(seed, position)))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _choose(row: Tensor, inverse: float, top_k: int, top_p: float, gap: float, draw: float) -> int:
    peak = row.max()  # NaN if there is one
    if not bool(peak.isfinite()):
        return -1
    if inverse == 0.0:
        return int((row == peak).nonzero()[0])
    cut = float(peak) + gap
    if 0 < top_k < len(row):
        cut = max(cut, float(row.sort(descending=True).values[top_k - 1]))
    cut = min(float(torch.tensor(cut, dtype=torch.float32)), float(peak))
    ids = (row >= cut).nonzero().flatten()
    weights = ((row[ids] - peak) * inverse).exp()
    if top_p < 1.0:
        order = weights.sort(descending=True, stable=True).indices
        reached = weights[order].double().cumsum(0)
        goal = top_p * float(reached[-1])
        order = order[: int(torch.searchsorted(reached, torch.tensor(goal, dtype=torch.float64)).clamp(max=len(order) - 1)) + 1]
        ids, weights = ids[order], weights[order]
    sums = weights.double().cumsum(0)
    goal = draw * float(sums[-1])
    index = int(torch.searchsorted(sums, torch.tensor(goal, dtype=torch.float64), right=True).clamp(max=len(ids) - 1))
    return int(ids[index])


def uniform(seed: int, position: int) -> float:
    """The draw of `seed` at `position`, in [0, 1).

    Source: Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    c0, c1, c2, c3 = position & _MASK, (position >> 32) & _MASK, 0, 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return ((c0 << 32 | c1) >> 11) * 2.0**-53


def sample_fake(
    logits: Tensor, inverse_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p_gap: Tensor, seeds: Tensor, positions: Tensor,
    truncate: bool,
) -> Tensor:  # fmt: skip
    """Shape rule: [N, V] -> int64 [N]."""
    check_sample(logits, inverse_temperature, top_k, top_p, min_p_gap, seeds, positions)
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def check_sample(
    logits: Tensor, inverse_temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p_gap: Tensor, seeds: Tensor, positions: Tensor
) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(f"llmc::sample: logits must be [N, V] with V at least 1, got {list(logits.shape)}")
    expected = {
        "inverse_temperature": (inverse_temperature, torch.float32), "top_k": (top_k, torch.int32), "top_p": (top_p, torch.float64),
        "min_p_gap": (min_p_gap, torch.float64), "seeds": (seeds, torch.int64), "positions": (positions, torch.int64),
    }  # fmt: skip
    for name, (tensor, dtype) in expected.items():
        if tensor.dim() != 1 or tensor.dtype != dtype:
            raise RuntimeError(f"llmc::sample: {name} must be {dtype} [N], got {tensor.dtype} {list(tensor.shape)}")
        torch._check(tensor.shape[0] == logits.shape[0], lambda name=name: f"llmc::sample: {name} and logits differ in rows")


def adjust_logits_reference(logits: Tensor, mask: Tensor | None, ids: Tensor, bias: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Masks, then bias, then penalties, in fp32.

    Args:
        logits: [N, V] floating.
        mask: int32 [N, ceil(V / 32)] or None; bit i % 32 of word i // 32 says whether token i is allowed.
        ids: int32 [N, P], tokens that a bias or penalty touches, distinct in a row; -1: none.
        bias: float32 [N, P], added.
        counts: float32 [N, P], how often the token stands in the output; 0: in the prompt alone; -1: in neither, no penalty.
        penalties: float32 [N, 3]: repetition (divides what is positive, multiplies what is not), frequency (times the count, taken
            away), presence (taken away once if the count is above 0).

    Returns:
        float32 [N, V], new; -inf for tokens that are not allowed.
    """
    check_adjust(logits, mask, ids, bias, counts, penalties)
    vocab = logits.shape[1]
    adjusted = logits.float().clone()
    if mask is not None:
        tokens = torch.arange(vocab, device=logits.device)
        adjusted = adjusted.masked_fill((mask[:, tokens // 32] >> (tokens % 32) & 1) == 0, float("-inf"))
    for row, at, added, count, (repetition, frequency, presence) in zip(adjusted, ids, bias, counts, penalties, strict=True):
        touched = at >= 0
        places, count = at[touched].long(), count[touched]
        values = row[places] + added[touched]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        penalised = repeated - frequency * count - presence * (count > 0)
        row[places] = torch.where(count >= 0, penalised, values)
    return adjusted


def adjust_logits_fake(logits: Tensor, mask: Tensor | None, ids: Tensor, bias: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Shape rule: float32 [N, V]."""
    check_adjust(logits, mask, ids, bias, counts, penalties)
    return logits.new_empty(logits.shape, dtype=torch.float32)


def check_adjust(logits: Tensor, mask: Tensor | None, ids: Tensor, bias: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or ids.dim() != 2 or ids.dtype != torch.int32 or penalties.shape[1:] != (3,):
        raise RuntimeError(
            f"llmc::adjust_logits: expected logits [N, V], ids int32 [N, P] and penalties [N, 3], got {list(logits.shape)}, "
            f"{ids.dtype} {list(ids.shape)} and {list(penalties.shape)}"
        )
    if bias.shape != ids.shape or counts.shape != ids.shape or {bias.dtype, counts.dtype, penalties.dtype} != {torch.float32}:
        raise RuntimeError(f"llmc::adjust_logits: bias and counts must be float32 {list(ids.shape)} and penalties float32")
    words = -(-logits.shape[1] // 32)
    if mask is not None and (mask.dtype != torch.int32 or mask.dim() != 2 or mask.shape[1] != words):
        raise RuntimeError(f"llmc::adjust_logits: mask must be int32 [N, {words}], got {mask.dtype} {list(mask.shape)}")


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_softmax of the raw logits at a row's token, its rank, and the num_top highest.

    logits: [N, V] floating; token_ids: int64 [N]; a negative one (a row that could not be sampled) reads token 0. Returns
    (logprobs float32 [N], ranks int64 [N] with 1 for the likeliest, top_ids int64 [N, num_top], top_logprobs float32 [N, num_top]),
    the lower id first among equals.
    """
    check_logprobs(logits, token_ids, num_top)
    wide = logits.double()
    logprobs = wide.log_softmax(1).float()
    at = token_ids.clamp_min(0)[:, None]
    ranks = 1 + (wide > wide.gather(1, at)).sum(1)
    top = wide.sort(dim=1, descending=True, stable=True).indices[:, :num_top].contiguous()
    return logprobs.gather(1, at)[:, 0], ranks, top, logprobs.gather(1, top)


def token_logprobs_fake(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape rule: see the reference."""
    check_logprobs(logits, token_ids, num_top)
    rows = logits.shape[0]
    return (
        logits.new_empty((rows,), dtype=torch.float32), logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows, num_top), dtype=torch.int64), logits.new_empty((rows, num_top), dtype=torch.float32),
    )  # fmt: skip


def check_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or token_ids.dim() != 1 or token_ids.dtype != torch.int64 or not 0 <= num_top <= logits.shape[1]:
        raise RuntimeError(
            f"llmc::token_logprobs: expected logits [N, V], token_ids int64 [N] and num_top in 0..V, got {list(logits.shape)}, "
            f"{token_ids.dtype} {list(token_ids.shape)} and {num_top}"
        )


def checked_tokens_reference(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that stand on a finite logit, for the host and for the next step.

    logits: [N, V] floating, what the tokens were chosen from; tokens: int64 [N]. Returns int64 [N] twice: the token, or -1 where it lies
    outside of the row or its logit is not finite; and the same with 0 for -1, since a next step may read any of them as its input.
    """
    check_checked(logits, tokens)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    value = logits.gather(1, torch.where(inside, tokens, 0)[:, None])[:, 0]
    good = inside & value.isfinite()
    return torch.where(good, tokens, -1), torch.where(good, tokens, 0)


def checked_tokens_fake(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Shape rule: int64 [N] twice."""
    check_checked(logits, tokens)
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)


def check_checked(logits: Tensor, tokens: Tensor) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or logits.shape[1] == 0 or tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise RuntimeError(
            f"llmc::checked_tokens: expected logits [N, V] and tokens int64 [N], got {list(logits.shape)} and "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    torch._check(tokens.shape[0] == logits.shape[0], lambda: "llmc::checked_tokens: tokens and logits differ in rows")
