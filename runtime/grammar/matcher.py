"""The masks of a step's sequences, from a worker that may die at any time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llmc.runtime.grammar.process import START_S, WorkerDied, WorkerProcess
from llmc.runtime.grammar.protocol import Compile, Compiled, Confirm, Confirmed, Forget, FromWorker, MaskRow, Masks, Match, MatchRow
from llmc.runtime.grammar.spec import GrammarSpec, grammar_of
from llmc.runtime.step import ScheduledSequence

STEP_S = 5.0  # for all masks of a step; a mask takes microseconds
REPLAY_S = 15.0  # for one sequence after a restart: its grammar again, and all of its tokens
_TOO_LONG = "the grammar worker took too long"


@dataclass(slots=True)
class _Session:
    """What is known of one running sequence. Changed by `Matcher` alone."""

    grammar: GrammarSpec
    num_told: int = -1  # output tokens the worker has; -1: it does not know the sequence


class Matcher:
    """Owns the matcher process. Not thread-safe.

    Args:
        spawn: starts a worker.
        max_sequence_tokens: longest sequence the engine runs, prompt and output.
    """

    def __init__(self, spawn: Callable[[], WorkerProcess], *, max_sequence_tokens: int) -> None:
        self._spawn = spawn
        self._max_sequence_tokens = max_sequence_tokens
        self._worker: WorkerProcess | None = None
        self._sessions: dict[str, _Session] = {}
        self._asked: list[ScheduledSequence] = []
        self._died: str | None = None  # why the worker was lost between `begin` and `finish`
        self._step = 0
        self._compiled: list[Compiled] = []
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    def start(self) -> WorkerProcess:
        """The worker, started if there is none."""
        if self._worker is None:
            self._worker = self._spawn()
        return self._worker

    def compile(self, grammar: GrammarSpec) -> None:
        """Have a grammar compiled ahead of its first mask; the answer comes from `compiled`."""
        self.start().send(Compile(grammar=grammar))

    def compiled(self, wait_s: float) -> list[Compiled]:
        """Answers to `compile` that have come; waits up to `wait_s` for one.

        Raises:
            WorkerDied: they will not come; the caller is to restart the worker.
        """
        if not self._compiled:
            self._keep(self.start().receive(wait_s))
        found, self._compiled = self._compiled, []
        return found

    def begin(self, sequences: list[ScheduledSequence]) -> None:
        """Ask for the masks of `sequences`; the worker computes them while the model runs."""
        self._asked, self._died = list(sequences), None
        self._step += 1
        try:
            self.start().send(Match(step=self._step, rows=[self._row(sequence) for sequence in sequences]))
        except WorkerDied as error:
            self._died = str(error)

    def finish(self) -> dict[str, MaskRow]:
        """The masks asked for, by request id. A row with an error ends its sequence alone."""
        asked, self._asked = self._asked, []
        try:
            if self._died is not None:
                raise WorkerDied(self._died)
            rows = self._await_masks(STEP_S)
        except WorkerDied:
            self.restart()
            return {sequence.request_id: self._alone(sequence) for sequence in asked}
        return {sequence.request_id: row for sequence, row in zip(asked, rows, strict=True)}

    def confirm(self, choices: list[tuple[ScheduledSequence, int]]) -> list[bool]:
        """Whether each token leaves its sequence's document a way to end in time."""
        if all(self._sessions[sequence.request_id].num_told >= 0 for sequence, _ in choices):
            try:
                return self._await_confirmed(choices)
            except WorkerDied:
                self.restart()
        return [self._confirm_alone(choice) for choice in choices]

    def forget(self, request_id: str) -> None:
        """Drop a sequence that ended; unknown ids had no grammar."""
        if self._sessions.pop(request_id, None) is not None and self._worker is not None:
            try:
                self._worker.send(Forget(sessions=[request_id]))
            except WorkerDied:
                self.restart()

    def restart(self) -> None:
        """End the worker; the next need starts a new one, to which every sequence is told anew."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
            self.num_restarts += 1
        self._compiled.clear()
        for session in self._sessions.values():
            session.num_told = -1

    def close(self) -> None:
        """End the worker for good."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _row(self, sequence: ScheduledSequence) -> MatchRow:
        """What the worker must hear of a sequence now. Notes it as told."""
        session = self._sessions.get(sequence.request_id)
        if session is None:
            assert sequence.sampling.structured_outputs is not None
            session = self._sessions[sequence.request_id] = _Session(grammar=grammar_of(sequence.sampling.structured_outputs))
        output = len(sequence.token_ids) - sequence.num_prompt_tokens
        fresh = session.num_told < 0
        told, session.num_told = max(0, session.num_told), output
        limit = self._max_sequence_tokens - sequence.num_prompt_tokens
        if sequence.sampling.max_tokens is not None:
            limit = min(limit, sequence.sampling.max_tokens)
        return MatchRow(
            session=sequence.request_id,
            token_ids=sequence.token_ids[sequence.num_prompt_tokens + told :],
            remaining=max(1, limit - output),
            grammar=session.grammar if fresh else None,
        )

    def _await_confirmed(self, choices: list[tuple[ScheduledSequence, int]]) -> list[bool]:
        """Ask and wait.

        Raises:
            WorkerDied: the worker ended or took too long.
        """
        worker = self.start()
        worker.send(Confirm(step=self._step, rows=[(sequence.request_id, token) for sequence, token in choices]))
        deadline = time.monotonic() + STEP_S
        while (left := deadline - time.monotonic()) > 0:
            for message in self._keep(worker.receive(left)):
                if isinstance(message, Confirmed) and message.step == self._step:
                    return message.accepted
        raise WorkerDied(_TOO_LONG)

    def _confirm_alone(self, choice: tuple[ScheduledSequence, int]) -> bool:
        """After a death: the sequence is told anew. False where that fails again: the way to the end is then taken."""
        for _ in range(2):
            if self._alone(choice[0]).error is not None:
                return False
            try:
                return self._await_confirmed([choice])[0]
            except WorkerDied:
                self.restart()
        return False

    def _await_masks(self, limit_s: float) -> list[MaskRow]:
        """The answer to the `Match` sent last.

        Raises:
            WorkerDied: it ended, or took longer than `limit_s` beside its start.
        """
        worker = self.start()
        deadline = time.monotonic() + limit_s
        while True:
            # A worker on its way up has its start's time on top.
            left = (deadline if worker.ready else max(deadline, worker.started_at + START_S + limit_s)) - time.monotonic()
            if left <= 0:
                raise WorkerDied(_TOO_LONG)
            was_ready = worker.ready
            for message in self._keep(worker.receive(min(left, 1.0))):
                if isinstance(message, Masks) and message.step == self._step:
                    return message.rows
            if worker.ready and not was_ready:
                deadline = time.monotonic() + limit_s

    def _alone(self, sequence: ScheduledSequence) -> MaskRow:
        """After a death: one sequence told anew to a worker, so that only the one at fault ends. A second death is its fault."""
        for last in (False, True):
            self._step += 1
            try:
                self.start().send(Match(step=self._step, rows=[self._row(sequence)]))
                return self._await_masks(REPLAY_S)[0]
            except (WorkerDied, OSError) as error:
                self.restart()
                if last or str(error) == _TOO_LONG:
                    return MaskRow(mask=b"", error=f"the grammar of this request could not be followed: {error}", at_fault=False)
        raise AssertionError("unreachable")

    def _keep(self, messages: list[FromWorker]) -> list[FromWorker]:
        self._compiled += [message for message in messages if isinstance(message, Compiled)]
        return messages
