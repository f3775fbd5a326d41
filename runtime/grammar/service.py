"""Structured output as the engine uses it: requests wait for their grammar, running sequences get masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmc.errors import ArtifactError, RequestRejected
from llmc.runtime.grammar.admission import Admission
from llmc.runtime.grammar.matcher import Matcher
from llmc.runtime.grammar.process import COMMAND, WorkerDied, WorkerProcess
from llmc.runtime.grammar.protocol import Configure, MaskRow
from llmc.runtime.grammar.spec import FIELD
from llmc.runtime.messages import GenerateRequest
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import SampledToken, ScheduledSequence


class GrammarService:
    """Everything about grammars that one engine needs. Not thread-safe; starts no process before the first request.

    Args:
        read_tokenizer: gives the bytes of the artifact's tokenizer.json.
        vocab_size: width of the logits.
        eos_token_ids: tokens that end a document; at least one.
        max_sequence_tokens: longest sequence the engine runs.
        max_waiting: requests that may wait for their grammars.
        command: the worker's program.
    """

    def __init__(
        self,
        read_tokenizer: Callable[[], bytes],
        *,
        vocab_size: int,
        eos_token_ids: list[int],
        max_sequence_tokens: int,
        max_waiting: int,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self._vocab_size = vocab_size
        configure: list[Configure] = []

        def spawn() -> WorkerProcess:
            if not configure:
                try:
                    tokenizer_json = read_tokenizer()
                except ArtifactError as error:  # changed on disk since the start: what needs no grammar goes on
                    raise WorkerDied(str(error)) from error
                configure.append(Configure(tokenizer_json=tokenizer_json, vocab_size=vocab_size, eos_token_ids=eos_token_ids))
            return WorkerProcess(configure[0], command=command)

        self.matcher = Matcher(spawn, max_sequence_tokens=max_sequence_tokens)
        self.admission = Admission(spawn, self.matcher, max_waiting=max_waiting)

    def add(self, request: GenerateRequest) -> None:
        """Let a request wait for its grammar; `poll` gives it back.

        Raises:
            RequestRejected: its grammar is known to be unusable, or too many wait.
        """
        self.admission.add(request)

    def poll(self, wait_s: float) -> list[tuple[GenerateRequest, RequestRejected | None]]:
        """Requests whose grammar is ready, or why it is not; waits up to `wait_s` for one."""
        return self.admission.poll(wait_s)

    def discard(self, request_id: str) -> bool:
        """Forget a request that waits. False: it does not."""
        return self.admission.discard(request_id)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their grammars."""
        return self.admission.num_waiting

    def begin(self, sequences: list[ScheduledSequence]) -> None:
        """Have the masks of a step's structured sequences computed."""
        self.matcher.begin(sequences)

    def sample(self, rows: list[tuple[ScheduledSequence, np.ndarray]], sampler: Sampler) -> dict[str, SampledToken]:
        """Choose a token for each sequence of `begin` that has logits.

        Args:
            rows: the sequences and their logits, float32 [V], changed in place.

        Returns:
            By request id; with `error` set where the grammar cannot be followed.
        """
        masks = self.matcher.finish()
        tokens: dict[str, SampledToken] = {}
        watched: list[tuple[ScheduledSequence, np.ndarray, int]] = []
        for sequence, row in rows:
            mask = masks[sequence.request_id]
            if mask.error is not None:
                status, param = (400, FIELD) if mask.at_fault else (500, None)
                tokens[sequence.request_id] = SampledToken(token_id=-1, error=mask.error, error_status=status, error_param=param)
                continue
            kept = row.copy() if mask.way_out >= 0 else row
            token = self._sample_one(sampler, row, sequence, unpacked(mask, self._vocab_size))
            tokens[sequence.request_id] = token
            if token.error is None and token.token_id != mask.way_out and mask.way_out >= 0:
                watched.append((sequence, kept, mask.way_out))
        if watched:
            choices = [(sequence, tokens[sequence.request_id].token_id) for sequence, _, _ in watched]
            for (sequence, row, way_out), accepted in zip(watched, self.matcher.confirm(choices), strict=True):
                if not accepted:
                    only = np.zeros(self._vocab_size, dtype=bool)
                    only[way_out] = True
                    tokens[sequence.request_id] = self._sample_one(sampler, row, sequence, only)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that ended; unknown ids had nothing kept."""
        self.matcher.forget(request_id)

    def close(self) -> None:
        """End the workers."""
        self.admission.close()
        self.matcher.close()

    @staticmethod
    def _sample_one(sampler: Sampler, row: np.ndarray, sequence: ScheduledSequence, mask: np.ndarray) -> SampledToken:
        try:
            return sampler.sample(row, sequence, mask)
        except Exception as error:
            return SampledToken(token_id=-1, error=f"sampling failed: {error}")


def unpacked(row: MaskRow, vocab_size: int) -> np.ndarray:
    """bool [V] of a packed mask; ids past its end are not allowed."""
    bits = np.unpackbits(np.frombuffer(row.mask, dtype=np.uint8), bitorder="little")[:vocab_size].view(bool)
    return bits if len(bits) == vocab_size else np.concatenate([bits, np.zeros(vocab_size - len(bits), dtype=bool)])
