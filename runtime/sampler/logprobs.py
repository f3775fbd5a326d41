"""Log-probabilities of a row of raw logits, before any sampling modification."""

from __future__ import annotations

import numpy as np

from llmc.runtime.messages import TokenLogprobs


def top_ids(row: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest entries of float32 [V], highest first, the lower id first among equals."""
    count = min(count, len(row))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    candidates = np.flatnonzero(row >= threshold)
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]


def token_logprobs(row: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """log_softmax of `row` (float32 [V], finite maximum) at `token_id`, its rank, and the `num_top` highest."""
    peak = row.max()
    log_sum = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
    chosen = row[token_id]
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(chosen) - log_sum,
        rank=1 + int(np.count_nonzero(row > chosen)),
        top=[(int(i), float(row[i]) - log_sum) for i in top_ids(row, num_top)],
    )
