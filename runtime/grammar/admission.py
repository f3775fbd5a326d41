"""Requests whose grammar is being compiled. A bomb costs its own request, and the checker process, which is started anew."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from llmc.errors import RequestRejected
from llmc.runtime.grammar.matcher import Matcher
from llmc.runtime.grammar.process import START_S, WorkerDied, WorkerProcess
from llmc.runtime.grammar.protocol import Compile, Compiled
from llmc.runtime.grammar.spec import FIELD, GrammarSpec, grammar_of
from llmc.runtime.messages import GenerateRequest

COMPILE_S = 4.0
_MAX_REMEMBERED = 256  # grammars known good or bad
_MAX_LOST = 3  # times a grammar is sent anew because the matcher was restarted for other sequences


@dataclass(slots=True)
class _Job:
    """One grammar and the requests that wait for it."""

    grammar: GrammarSpec
    requests: list[GenerateRequest] = field(default_factory=list)
    deadline: float = 0.0  # of the stage it is in; 0: not begun
    checked: bool = False
    second_try: bool = False  # its worker died once, perhaps by another's hand
    worker_pid: int = 0  # who was asked
    times_lost: int = 0  # that worker was replaced meanwhile, and the question with it


class Admission:
    """Compiles one grammar at a time: first in the checker, then, known to be harmless, in the matcher. Not thread-safe.

    Args:
        spawn: starts a checker.
        matcher: where the sequences will run.
        max_waiting: requests that may wait here.
    """

    def __init__(self, spawn: Callable[[], WorkerProcess], matcher: Matcher, *, max_waiting: int) -> None:
        self._spawn = spawn
        self._matcher = matcher
        self._max_waiting = max_waiting
        self._checker: WorkerProcess | None = None
        self._jobs: OrderedDict[bytes, _Job] = OrderedDict()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()  # key -> why it cannot be used, None: it can
        self.num_restarts = 0

    @property
    def num_waiting(self) -> int:
        return sum(len(job.requests) for job in self._jobs.values())

    @property
    def pid(self) -> int | None:
        return self._checker.pid if self._checker is not None else None

    def add(self, request: GenerateRequest) -> None:
        """Let a request wait for its grammar.

        Raises:
            RequestRejected: the grammar is known to be unusable (400), or too many wait (429).
        """
        assert request.sampling.structured_outputs is not None
        grammar = grammar_of(request.sampling.structured_outputs)
        key = grammar.key
        problem = self._known.get(key)
        if problem is not None:
            raise _rejected(problem)
        if self.num_waiting >= self._max_waiting:
            raise RequestRejected(
                f"{self._max_waiting} requests wait for their grammars, as many as may; try again later", status=429, code="queue_full"
            )
        job = self._jobs.setdefault(key, _Job(grammar=grammar, checked=key in self._known))
        job.requests.append(request)

    def discard(self, request_id: str) -> bool:
        """Forget a waiting request. A compile that has begun goes on all the same. False: it does not wait here."""
        for key, job in self._jobs.items():
            for request in job.requests:
                if request.request_id == request_id:
                    job.requests.remove(request)
                    if not job.requests and job.deadline == 0.0:
                        del self._jobs[key]
                    return True
        return False

    def poll(self, wait_s: float) -> list[tuple[GenerateRequest, RequestRejected | None]]:
        """Go on with the first grammar; waits up to `wait_s` for it. Returns requests that are done waiting, and what is wrong if any."""
        if not self._jobs:
            return []
        job = next(iter(self._jobs.values()))
        try:
            if job.deadline == 0.0:
                self._begin(job)
            answer = self._advance(job, wait_s)
        except WorkerDied as error:
            self._end_worker(job)
            if not job.second_try:
                job.second_try, job.deadline = True, 0.0
                return []
            return self._done(job, f"the grammar could not be compiled: {error}", remember=False)
        except OSError as error:
            return self._done(job, f"no grammar worker could be started ({error.strerror})", status=503, remember=False)
        if answer is None:
            return []
        if answer.error is None and not job.checked:
            job.checked, job.deadline = True, 0.0
            return []
        return self._done(job, answer.error)

    def close(self) -> None:
        """End the checker for good."""
        if self._checker is not None:
            self._checker.kill()
            self._checker = None

    def _begin(self, job: _Job) -> None:
        """Send a grammar to the worker of its stage."""
        if job.checked:
            self._matcher.compile(job.grammar)
        else:
            if self._checker is None:
                self._checker = self._spawn()
                self._matcher.start()  # its start runs beside the checker's
            self._checker.send(Compile(grammar=job.grammar))
        job.worker_pid = self._worker(job).pid
        job.deadline = time.monotonic() + COMPILE_S

    def _advance(self, job: _Job, wait_s: float) -> Compiled | None:
        """See how far a grammar is. None: not done.

        Raises:
            WorkerDied: the worker ended.
        """
        worker = self._worker(job)
        if worker.pid != job.worker_pid:  # a step found the matcher dead and started another, which knows nothing of this grammar
            job.times_lost += 1
            if job.times_lost > _MAX_LOST:
                raise WorkerDied("the grammar worker was restarted again and again")
            job.deadline = 0.0
            return None
        was_ready = worker.ready
        answers = self._matcher.compiled(wait_s) if job.checked else worker.receive(wait_s)
        key = job.grammar.key
        for answer in answers:
            if isinstance(answer, Compiled) and answer.key == key:
                return answer
        now = time.monotonic()
        if worker.ready and not was_ready:
            job.deadline = now + COMPILE_S
        if now <= (job.deadline if worker.ready else worker.started_at + START_S):
            return None
        self._end_worker(job)
        return Compiled(key=key, error=f"the grammar takes longer than {COMPILE_S:g} s to compile; send a simpler one")

    def _worker(self, job: _Job) -> WorkerProcess:
        """The worker of a job's stage."""
        if job.checked:
            return self._matcher.start()
        assert self._checker is not None
        return self._checker

    def _end_worker(self, job: _Job) -> None:
        if job.checked:
            self._matcher.restart()
        else:
            self._end_checker()

    def _end_checker(self) -> None:
        if self._checker is not None:
            self._checker.kill()
            self._checker = None
            self.num_restarts += 1

    def _done(
        self, job: _Job, problem: str | None, *, status: int = 400, remember: bool = True
    ) -> list[tuple[GenerateRequest, RequestRejected | None]]:
        """Take a job off the list."""
        key = job.grammar.key
        del self._jobs[key]
        if remember:
            self._known[key] = problem
            self._known.move_to_end(key)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return [(request, None if problem is None else _rejected(problem, status)) for request in job.requests]


def _rejected(problem: str, status: int = 400) -> RequestRejected:
    message = f"structured output: {problem}"
    if status != 400:
        return RequestRejected(message, status=status)
    return RequestRejected(message, param=FIELD, code="invalid_grammar")
