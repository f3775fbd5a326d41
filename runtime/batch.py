"""StepPlan -> DeviceBatch: host arrays in the shapes the compiled program reads, in memory allocated once.

Every array is a contiguous prefix of its buffer, because compiled programs read inputs as contiguous; addresses therefore stay
the same from step to step and an executor may keep tensor handles to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import is_

import numpy as np

from llmc.errors import InternalError
from llmc.runtime.step import DeviceBatch, ScheduledSequence

# Arrays: a Python integer is made into one each time it is added, which takes longer than the addition.
_ONE_INT64, _ONE_INT32 = np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsRows:
    """Rows of the logits that belong to one sequence: [first, first + num_prompt) prompt log-probabilities, then the sample."""

    first: int
    num_prompt: int
    sample: int | None  # row to sample from, then one row per guess; None when the prompt goes on in a later step


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBatch:
    """A DeviceBatch and whose its rows are. `rows` runs parallel to the sequences it was built from."""

    batch: DeviceBatch
    rows: list[LogitsRows]
    one_each: bool  # row i of the logits is what sequence i samples from, and there are no others


@dataclass(slots=True, kw_only=True)
class _Decoding:
    """The decode step built last, while its numbers stand in the buffers. Changed by the builder alone."""

    built: BuiltBatch
    block_ids: list[tuple[list[int], ...]]  # of each sequence, the lists that its rows of the tables were copied from
    ends: list[int]


class BatchBuilder:
    """Owns the host buffers. `build` overwrites them, so a DeviceBatch is valid until the next call.

    Args:
        block_size: tokens per block.
        num_groups: KV groups, each with its own block table and slot mapping.
        vocab_size: width of the logits; ids outside are refused here as well, since a kernel would read past its matrix.
        max_num_batched_tokens, max_num_seqs, max_model_len: the scheduler's limits.
        lora: the program wants each token's adapter.
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
        lora: bool = False,
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
        self._lora_slots = np.full(max_num_batched_tokens, -1, dtype=np.int32) if lora else None
        self._decode_rows = [LogitsRows(first=index, num_prompt=0, sample=index) for index in range(max_num_seqs)]
        # Whose blocks the rows of the table hold since the last decode step, how many of them, and the table's width: most rows stay
        # as they are from step to step, because a sequence's blocks only grow at their end.
        self._table_rows: list[tuple[tuple[list[int], ...], int]] = []
        self._table_width = 0
        self._decoding: _Decoding | None = None

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

    def build_decode(self, sequences: list[ScheduledSequence], *, fed: bool = False) -> BuiltBatch | None:
        """Check and lay out a step in which every sequence decodes one token, as nearly all steps are: a few operations over all
        sequences in place of some for each. None: another kind of step, or one that `check` would refuse somewhere; use `build`.

        A step of the same sequences as the one before gives the same BuiltBatch again, with new numbers in its arrays.

        Args:
            fed: the sequences' last tokens are known to the device alone, which puts them in; `input_ids` are 0.
        """
        decoding, self._decoding = self._decoding, None
        if decoding is None or not self._move_on(decoding, sequences, fed=fed):
            decoding = self._begin_decoding(sequences, fed=fed)
        self._decoding = decoding
        return None if decoding is None else decoding.built

    def _move_on(self, decoding: _Decoding, sequences: list[ScheduledSequence], *, fed: bool) -> bool:
        """Make the step built last the one of `sequences`, if these are the same and each goes on by one token: most numbers grow by one.

        False: they are others, the tables get wider, or `check` would refuse; the buffers' content is then of no use.
        """
        block_ids = [s.block_ids for s in sequences]
        starts = [s.start for s in sequences]
        # The lists themselves are compared: a sequence that came back after a preemption has others.
        if starts != decoding.ends or not all(map(is_, block_ids, decoding.block_ids)):
            return False
        ends = [s.end for s in sequences]
        token_lists = [s.token_ids for s in sequences]
        if ends != [start + 1 for start in starts] or list(map(len, token_lists)) != (starts if fed else ends):
            return False
        ids = [0] if fed else [tokens[-1] for tokens in token_lists]
        if min(ids) < 0 or max(ids) >= self._vocab_size or True in [s.needs_prompt_logprobs for s in sequences]:
            return False
        batch, slots = decoding.built.batch, decoding.built.batch.slot_mapping
        batch.input_ids[:] = ids
        for array, one in ((batch.positions, _ONE_INT64), (slots, _ONE_INT64), (batch.seq_lens, _ONE_INT32)):
            np.add(array, one, out=array)
        if self._lora_slots is not None:
            self._lora_slots[: len(sequences)] = [s.lora_slot for s in sequences]
        decoding.ends = ends
        entering = [row for row, start in enumerate(starts) if start % self._block_size == 0]
        return all(self._enter_block(batch, row, block_ids[row], starts[row] // self._block_size) for row in entering)

    def _enter_block(self, batch: DeviceBatch, row: int, groups: tuple[list[int], ...], index: int) -> bool:
        """Bring row `row` into its block number `index`: slots and tables. False: there is none, or no column for it."""
        if index >= self._table_width or any(len(blocks) <= index or blocks[index] < 0 for blocks in groups):
            return False
        self._table_rows[row] = (groups, index + 1)
        for group, blocks in enumerate(groups):
            batch.slot_mapping[group, row] = blocks[index] * self._block_size
            # Where a window has moved on, blocks before this one were given back.
            first = index if blocks[0] >= 0 else 0
            batch.block_tables[group, row, first : index + 1] = blocks[first : index + 1]
        return True

    def _begin_decoding(self, sequences: list[ScheduledSequence], *, fed: bool) -> _Decoding | None:
        """`build_decode` of sequences that are not those of the step before."""
        token_lists = [s.token_ids for s in sequences]
        ends = [s.end for s in sequences]
        unknown = int(fed)
        if [len(tokens) + unknown for tokens in token_lists] != ends or any(s.needs_prompt_logprobs for s in sequences):
            return None
        starts = [s.start for s in sequences]
        if min(starts) < 0 or len(sequences) > len(self._decode_rows):
            return None
        block_ids = [s.block_ids for s in sequences]
        if any(len(groups) != self._num_groups for groups in block_ids):
            return None
        ids = np.zeros(len(ends), dtype=np.int64) if fed else np.array([tokens[-1] for tokens in token_lists], dtype=np.int64)
        positions = np.array(starts, dtype=np.int64)
        last_blocks = positions // self._block_size
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size or not np.array_equal(positions + 1, ends):
            return None
        num_seqs = len(sequences)
        slots = self._slots[: self._num_groups * num_seqs].reshape(self._num_groups, num_seqs)
        indices, offsets = last_blocks.tolist(), positions % self._block_size
        for group in range(self._num_groups):
            lists = [groups[group] for groups in block_ids]
            if any(len(blocks) <= index for blocks, index in zip(lists, indices, strict=True)):
                return None
            own = np.array([blocks[index] for blocks, index in zip(lists, indices, strict=True)], dtype=np.int64)
            if int(own.min()) < 0:
                return None
            slots[group] = own * self._block_size + offsets
        self._ids[:num_seqs] = ids
        self._positions[:num_seqs] = positions
        self._seq_lens[:num_seqs] = ends
        self._logits_indices[:num_seqs] = np.arange(num_seqs)
        self._query_start_loc[: num_seqs + 1] = np.arange(num_seqs + 1)
        if self._lora_slots is not None:
            self._lora_slots[:num_seqs] = [s.lora_slot for s in sequences]
        batch = DeviceBatch(
            input_ids=self._ids[:num_seqs],
            positions=self._positions[:num_seqs],
            logits_indices=self._logits_indices[:num_seqs],
            slot_mapping=slots,
            block_tables=self._decode_tables(block_ids, last_blocks + 1),
            seq_lens=self._seq_lens[:num_seqs],
            query_start_loc=self._query_start_loc[: num_seqs + 1],
            lora_slots=None if self._lora_slots is None else self._lora_slots[:num_seqs],
        )
        built = BuiltBatch(batch=batch, rows=self._decode_rows[:num_seqs], one_each=True)
        return _Decoding(built=built, block_ids=block_ids, ends=ends)

    def _decode_tables(self, block_ids: list[tuple[list[int], ...]], used: np.ndarray) -> np.ndarray:
        """Block tables [G, B, M] of decoding sequences; rows are written again only where they changed."""
        num_seqs, width = len(block_ids), int(used.max())
        tables = self._tables[: self._num_groups * num_seqs * width].reshape(self._num_groups, num_seqs, width)
        rows = list(zip(block_ids, used.tolist(), strict=True))
        # Groups lie one behind the other, so another number of rows moves all but the first group.
        kept = self._table_rows if width == self._table_width and (self._num_groups == 1 or num_seqs == len(self._table_rows)) else []
        # The lists themselves are compared: a sequence that came back after a preemption has others, or its row was left out meanwhile.
        stale = [i for i, (new, old) in enumerate(zip(rows, kept, strict=False)) if new[0] is not old[0] or new[1] != old[1]]
        stale += range(len(kept), num_seqs)
        self._table_rows, self._table_width = rows, width
        if stale:
            where, counts = np.array(stale), used[stale]
            filled = np.arange(width) < counts[:, None]
            for group in range(self._num_groups):
                written = np.full((len(stale), width), -1, dtype=np.int32)
                written[filled] = np.fromiter(
                    chain.from_iterable(rows[i][0][group][: rows[i][1]] for i in stale), dtype=np.int32, count=int(counts.sum())
                )
                tables[group, where] = written
        return tables

    def build(self, sequences: list[ScheduledSequence]) -> BuiltBatch:
        """Lay out checked sequences. At least one logits row is asked for, since compiled programs may not take none."""
        self._table_rows, self._decoding = [], None  # they are written over
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
            if self._lora_slots is not None:
                self._lora_slots[row:row_end] = sequence.lora_slot
            for group, blocks in enumerate(sequence.block_ids):
                used = -(-sequence.end // self._block_size)
                tables[group, index, :used] = blocks[:used]
            self._seq_lens[index] = sequence.end
            self._query_start_loc[index + 1] = row_end
            rows.append(self._ask_logits(sequence, row, num_logits))
            num_logits += rows[-1].num_prompt + (sequence.num_drafts + 1 if rows[-1].sample is not None else 0)
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
            lora_slots=None if self._lora_slots is None else self._lora_slots[:num_tokens],
        )
        one_each = len(rows) == num_logits and all(place.sample == index and not place.num_prompt for index, place in enumerate(rows))
        return BuiltBatch(batch=batch, rows=rows, one_each=one_each)

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
        first, row_end, count = num_logits + num_prompt, row + sequence.end - sequence.start, sequence.num_drafts + 1
        self._logits_indices[first : first + count] = np.arange(row_end - count, row_end)
        return LogitsRows(first=num_logits, num_prompt=num_prompt, sample=num_logits + num_prompt)
