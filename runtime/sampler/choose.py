"""One draw from a row of logits: temperature, min-p, top-k, top-p, in the order users know from vLLM."""

from __future__ import annotations

import numpy as np

from llmc.runtime.sampler.logprobs import top_ids

_BLOCK = 512  # two-level inverse transform: sum blocks, then look inside one
_TOP_P_FIRST = 1024  # most distributions reach top_p within so many tokens; sorting the rest is then saved


def choose(row: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float, draw: float) -> int:
    """Draw a token id from `row`.

    Args:
        row: float32 [V] logits after penalties and masks, with a finite maximum; -inf is never chosen.
        temperature: above 0.
        top_k: keep the k largest, ties with the k-th too; below 1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        draw: uniform in [0, 1), the only randomness.
    """
    peak = row.max()
    if not (0 < top_k < len(row)) and top_p >= 1.0 and min_p <= 0.0:
        weights = np.exp((row - peak) * np.float32(1.0 / temperature))
        return _inverse_transform(weights, draw)
    keep = _candidates(row, peak, temperature=temperature, top_k=top_k, min_p=min_p)
    values = row if keep is None else row[keep]
    weights = np.exp((values - peak) * np.float32(1.0 / temperature))
    if top_p < 1.0:
        order = _nucleus(weights, top_p)
        keep = order if keep is None else keep[order]
        weights = weights[order]
    index = _inverse_transform(weights, draw)
    return index if keep is None else int(keep[index])


def _candidates(row: np.ndarray, peak: np.float32, *, temperature: float, top_k: int, min_p: float) -> np.ndarray | None:
    """Ids that survive top-k and min-p, ascending; None when both are off."""
    threshold = -np.inf
    if 0 < top_k < len(row):
        threshold = float(np.partition(row, len(row) - top_k)[len(row) - top_k])
    if min_p > 0.0:
        threshold = max(threshold, float(peak) + temperature * float(np.log(min_p)))
    if threshold == -np.inf:
        return None
    # min_p = 1 must keep the likeliest token whatever the rounding of the line above
    return np.flatnonzero(row >= min(np.float32(threshold), peak))


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of largest weights that holds `top_p` of their sum, largest first."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    count = min(_TOP_P_FIRST, len(weights))
    while True:
        order = top_ids(weights, count)
        reached = np.cumsum(weights[order], dtype=np.float64)
        if reached[-1] >= goal or count == len(weights):
            return order[: min(int(np.searchsorted(reached, goal, side="left")) + 1, len(order))]
        count = min(count * 8, len(weights))


def _inverse_transform(weights: np.ndarray, draw: float) -> int:
    """The index where the running sum of `weights` (float32 [n], some above 0) passes `draw` of the total."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    goal = draw * sums[-1]
    block = min(int(np.searchsorted(sums, goal, side="right")), len(starts) - 1)
    before = sums[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    index = int(starts[block]) + min(int(np.searchsorted(inside, goal, side="right")), len(inside) - 1)
    if weights[index] > 0.0:
        return index
    return int(np.flatnonzero(weights[: index + 1])[-1])  # rounding left the draw past the last likely token
