"""StepPlan -> DeviceBatch: host arrays in the shapes the compiled program reads, in memory allocated once.

Every array is a contiguous prefix of its buffer, because compiled programs read inputs as contiguous; addresses therefore stay
the same from step to step and an executor may keep tensor handles to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.errors import InternalError
from llmc.runtime.step import DeviceBatch, ScheduledSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRows:
    """Rows of the logits that belong to one sequence: [first, first + num_prompt) prompt log-probabilities, then the sample."""

    first: int
    num_prompt: int
    sample: int | None  # row to sample from; None when the prompt goes on in a later step


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBatch:
    """A DeviceBatch and whose its rows are. `rows` runs parallel to the sequences it was built from."""

    batch: DeviceBatch
    rows: list[LogitsRows]


class BatchBuilder:
    """Owns the host buffers. `build` overwrites them, so a DeviceBatch is valid until the next call.

    Args:
        block_size: tokens per block.
        num_groups: KV groups, each with its own block table and slot mapping.
        vocab_size: width of the logits; ids outside are refused here as well, since a kernel would read past its matrix.
        max_num_batched_tokens, max_num_seqs, max_model_len: the scheduler's limits.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_groups: int,
        vocab_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._block_size = block_size
        self._num_groups = num_groups
        self._vocab_size = vocab_size
        max_blocks = -(-max_model_len // block_size) + 1
        self._ids = np.zeros(max_num_batched_tokens, dtype=np.int64)
        self._positions = np.zeros(max_num_batched_tokens, dtype=np.int64)
        self._logits_indices = np.zeros(max_num_batched_tokens, dtype=np.int64)
        self._slots = np.zeros(num_groups * max_num_batched_tokens, dtype=np.int64)
        self._tables = np.zeros(num_groups * max_num_seqs * max_blocks, dtype=np.int32)
        self._seq_lens = np.zeros(max_num_seqs, dtype=np.int32)
        self._query_start_loc = np.zeros(max_num_seqs + 1, dtype=np.int32)

    def check(self, sequence: ScheduledSequence) -> None:
        """Refuse a sequence the kernels could not compute safely. Asks only.

        Raises:
            InternalError: the interval is empty or unowned, or a token id lies outside the vocabulary.
        """
        start, end = sequence.start, sequence.end
        if not 0 <= start < end <= len(sequence.token_ids):
            raise InternalError(f"sequence {sequence.request_id}: [{start}, {end}) of {len(sequence.token_ids)} tokens was scheduled")
        if len(sequence.block_ids) != self._num_groups:
            raise InternalError(f"sequence {sequence.request_id}: {len(sequence.block_ids)} block lists for {self._num_groups} KV groups")
        for blocks in sequence.block_ids:
            if len(blocks) * self._block_size < end:
                raise InternalError(f"sequence {sequence.request_id}: {len(blocks)} blocks of {self._block_size} cannot hold {end} tokens")
            if min(blocks[start // self._block_size : -(-end // self._block_size)]) < 0:
                raise InternalError(f"sequence {sequence.request_id}: a token of [{start}, {end}) lies in a block it gave back")
        tokens = sequence.token_ids[start:end]
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise InternalError(f"sequence {sequence.request_id}: a token id lies outside the vocabulary of {self._vocab_size}")

    def build(self, sequences: list[ScheduledSequence]) -> BuiltBatch:
        """Lay out checked sequences. At least one logits row is asked for, since compiled programs may not take none."""
        num_seqs = len(sequences)
        num_tokens = sum(s.end - s.start for s in sequences)
        num_table_blocks = max(-(-s.end // self._block_size) for s in sequences)
        slots = self._slots[: self._num_groups * num_tokens].reshape(self._num_groups, num_tokens)
        tables = self._tables[: self._num_groups * num_seqs * num_table_blocks].reshape(self._num_groups, num_seqs, num_table_blocks)
        tables.fill(-1)
        rows: list[LogitsRows] = []
        num_logits = row = 0
        self._query_start_loc[0] = 0
        for index, sequence in enumerate(sequences):
            row_end = row + sequence.end - sequence.start
            self._place(sequence, row, row_end, slots)
            for group, blocks in enumerate(sequence.block_ids):
                used = -(-sequence.end // self._block_size)
                tables[group, index, :used] = blocks[:used]
            self._seq_lens[index] = sequence.end
            self._query_start_loc[index + 1] = row_end
            rows.append(self._ask_logits(sequence, row, num_logits))
            num_logits += rows[-1].num_prompt + (rows[-1].sample is not None)
            row = row_end
        if num_logits == 0:
            self._logits_indices[0] = row - 1
            num_logits = 1
        batch = DeviceBatch(
            input_ids=self._ids[:num_tokens],
            positions=self._positions[:num_tokens],
            logits_indices=self._logits_indices[:num_logits],
            slot_mapping=slots,
            block_tables=tables,
            seq_lens=self._seq_lens[:num_seqs],
            query_start_loc=self._query_start_loc[: num_seqs + 1],
        )
        return BuiltBatch(batch=batch, rows=rows)

    def _place(self, sequence: ScheduledSequence, row: int, row_end: int, slots: np.ndarray) -> None:
        """Ids, positions and slots of tokens [start, end), into rows [row, row_end)."""
        start, end = sequence.start, sequence.end
        if end - start == 1:  # decode, the common case, without temporary arrays
            self._ids[row] = sequence.token_ids[start]
            self._positions[row] = start
            for group, blocks in enumerate(sequence.block_ids):
                slots[group, row] = blocks[start // self._block_size] * self._block_size + start % self._block_size
            return
        self._ids[row:row_end] = sequence.token_ids[start:end]
        positions = np.arange(start, end, dtype=np.int64)
        self._positions[row:row_end] = positions
        first = start // self._block_size
        for group, blocks in enumerate(sequence.block_ids):
            own = np.asarray(blocks[first : -(-end // self._block_size)], dtype=np.int64)
            slots[group, row:row_end] = own[positions // self._block_size - first] * self._block_size + positions % self._block_size

    def _ask_logits(self, sequence: ScheduledSequence, row: int, num_logits: int) -> LogitsRows:
        """Write the rows this sequence needs behind the `num_logits` there are already."""
        num_prompt = 0
        if sequence.needs_prompt_logprobs:  # position p tells about token p + 1, so the last prompt token's row is not one
            num_prompt = max(0, min(sequence.end, sequence.num_prompt_tokens - 1) - sequence.start)
            self._logits_indices[num_logits : num_logits + num_prompt] = np.arange(row, row + num_prompt)
        if not sequence.samples:
            return LogitsRows(first=num_logits, num_prompt=num_prompt, sample=None)
        self._logits_indices[num_logits + num_prompt] = row + sequence.end - sequence.start - 1
        return LogitsRows(first=num_logits, num_prompt=num_prompt, sample=num_logits + num_prompt)
