"""What a sequence has said so far, kept as arrays that grow by one token a step."""

from __future__ import annotations

import numpy as np


class TokenCounts:
    """Distinct tokens of one sequence and how often each stands in its output.

    `advance` looks only at tokens it has not seen, so a step costs one dictionary lookup however long the sequence is.
    """

    def __init__(self, prompt: list[int]) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._ids = np.empty(max(64, 2 * len(distinct)), dtype=np.int64)
        self._ids[: len(distinct)] = distinct
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {int(token): slot for slot, token in enumerate(distinct)}
        self._num_seen = self._num_prompt = len(prompt)

    def advance(self, token_ids: list[int]) -> None:
        """Take in `token_ids` (prompt and output) from where the last call ended. Changes this object only."""
        for token in token_ids[self._num_seen :]:
            slot = self._slots.get(token)
            if slot is None:
                slot = self._slots[token] = len(self._slots)
                if slot == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[slot] = token
            self._counts[slot] += 1
        self._num_seen = len(token_ids)

    @property
    def ids(self) -> np.ndarray:
        """int64 [D], distinct tokens of prompt and output."""
        return self._ids[: len(self._slots)]

    @property
    def output_counts(self) -> np.ndarray:
        """float32 [D], occurrences of each in the output; 0 for those only in the prompt."""
        return self._counts[: len(self._slots)]
