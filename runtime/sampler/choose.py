"""One draw from a row of logits: temperature, min-p, top-k, top-p, in the order users know from vLLM."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

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
        return choose_from_all(row[None], peaks=[peak], temperatures=[temperature], draws=[draw])[0]
    keep = _candidates(row, peak, temperature=temperature, top_k=top_k, min_p=min_p)
    values = row if keep is None else row[keep]
    weights = np.exp((values - peak) * np.float32(1.0 / temperature))
    if top_p < 1.0:
        order = _nucleus(weights, top_p)
        keep = order if keep is None else keep[order]
        weights = weights[order]
    index = _inverse_transform(weights[None], [draw])[0]
    return index if keep is None else int(keep[index])


def choose_from_all(rows: np.ndarray, *, peaks: Sequence[float], temperatures: list[float], draws: list[float]) -> list[int]:
    """`choose` for several rows (float32 [R, V]) of which nothing is cut off, each as if it were alone. peaks: their largest logits."""
    weights = rows - np.array(peaks, dtype=np.float32)[:, None]
    weights *= np.array([1.0 / temperature for temperature in temperatures], dtype=np.float32)[:, None]
    return _inverse_transform(np.exp(weights, out=weights), draws)


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


@lru_cache
def _block_starts(length: int) -> np.ndarray:
    return np.arange(0, length, _BLOCK)


def _inverse_transform(weights: np.ndarray, draws: list[float]) -> list[int]:
    """Of each row of `weights` (float32 [R, n], some above 0) the index where its running sum passes its draw's part of the total."""
    starts = _block_starts(weights.shape[1])
    sums = np.add.accumulate(np.add.reduceat(weights, starts, axis=1, dtype=np.float64), axis=1)
    found: list[int] = []
    for row, row_sums, draw in zip(weights, sums.tolist(), draws, strict=True):
        goal = draw * row_sums[-1]
        block = min(bisect_right(row_sums, goal), len(starts) - 1)
        before = row_sums[block - 1] if block else 0.0
        start = block * _BLOCK
        inside = before + np.add.accumulate(row[start : start + _BLOCK].astype(np.float64))
        index = start + min(int(inside.searchsorted(goal, side="right")), len(inside) - 1)
        if row.item(index) <= 0.0:
            index = int(np.flatnonzero(row[: index + 1])[-1])  # rounding left the draw past the last likely token
        found.append(index)
    return found
