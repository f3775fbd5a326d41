"""Which replicas are ready, and which one takes a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from llmc.runtime.replicas.upstream import Call, Head
from llmc.runtime.server.logs import log

_CHECK_EVERY_S = 0.25


class Backend(Protocol):
    """A replica, wherever it runs."""

    was_ready: bool  # once at least

    @property
    def exit_code(self) -> int | None:
        """Of its process, where it has ended and nobody but us starts it again."""

    async def check(self) -> bool:
        """Whether a request sent now would be worked on."""

    def exchange(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """See `upstream.exchange`."""

    async def stop(self, timeout_s: float) -> None:
        """Let it finish what it computes, for so long."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(kw_only=True, slots=True)
class Replica:
    """A backend and what the front knows of it."""

    index: int
    backend: Backend
    ready: bool = False
    num_open: int = 0  # requests it was sent and has not answered to the end
    num_requests: int = 0
    num_lost: int = 0  # requests whose answer it did not finish

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One more request is open."""
        self.num_open += 1
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def lose(self) -> None:
        """A request was lost. Nothing more is sent here until the next check has found it ready."""
        self.num_lost += 1
        if self.ready:
            self.ready = False
            log("replica_lost", replica=self.index)


class Pool:
    """The replicas. `watch` keeps `ready` true to life."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.replicas = [Replica(index=i, backend=backend) for i, backend in enumerate(backends)]
        self.first_ready = asyncio.Event()  # all of them have been
        self.gave_up = asyncio.Event()  # one ended without ever having been ready
        self.exit_code = 0

    @property
    def num_open(self) -> int:
        """Requests being answered."""
        return sum(replica.num_open for replica in self.replicas)

    @property
    def num_ready(self) -> int:
        return sum(replica.ready for replica in self.replicas)

    def choose(self, tried: set[int]) -> Replica | None:
        """The ready replica with the fewest open requests, of equals the one that was sent the fewest; none of `tried`."""
        ready = [replica for replica in self.replicas if replica.ready and replica.index not in tried]
        return min(ready, key=lambda replica: (replica.num_open, replica.num_requests), default=None)

    async def watch(self) -> None:
        """Check every replica, each at its own pace, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for replica in self.replicas:
                group.create_task(self._watch(replica))

    async def _watch(self, replica: Replica) -> None:
        while True:
            ready = await replica.backend.check()
            if ready != replica.ready:
                replica.ready = ready
                log("replica_ready" if ready else "replica_not_ready", replica=replica.index)
            if all(other.backend.was_ready for other in self.replicas):
                self.first_ready.set()
            code = replica.backend.exit_code
            if code is not None and not replica.backend.was_ready:
                self.exit_code = code if code > 0 else 70
                self.gave_up.set()
            await asyncio.sleep(_CHECK_EVERY_S)
