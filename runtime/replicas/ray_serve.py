"""Replicas under Ray Serve: it places them, watches them, starts them again and ends them; each is a Serve deployment of its own.

One deployment per replica, so that the front can ask each for its health and its metrics, and send a request to the one with the
fewest open ones. Serve's own HTTP proxy is off: its errors are not in OpenAI's shape, and it has none of our limits.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from llmc.errors import ConfigError
from llmc.runtime.replicas.process import CHILD_COMMAND, ReplicaProcess
from llmc.runtime.replicas.upstream import Call, Head, ReplicaLost
from llmc.runtime.server.logs import log
from llmc.runtime.server.settings import ServerSettings

_CHECK_TIMEOUT_S = 5.0
_MANY = 1 << 20  # Serve queues nothing: the replica's own scheduler does, and answers 429


class RayReplica:
    """What runs inside a Serve replica: a server process of its own, which ends with the actor's process."""

    def __init__(self, settings: bytes, command: tuple[str, ...]) -> None:
        self._replica = ReplicaProcess(msgspec.json.decode(settings, type=ServerSettings), command)

    async def ready(self) -> tuple[bool, str, int, int]:
        """Whether requests would be worked on; the machine's name and the ids of the actor's process and of the server's."""
        return await self._replica.check(), socket.gethostname(), os.getpid(), self._replica.pid

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose answer is an exception."""
        if self._replica.exit_code is not None:
            raise RuntimeError(f"the replica's server ended with exit code {self._replica.exit_code}")

    async def exchange(self, call: bytes) -> AsyncGenerator[bytes | None, None]:
        """The head as JSON, then the body's parts; None in place of the rest when the server was lost."""
        answer = self._replica.exchange(msgspec.msgpack.decode(call, type=Call))
        try:
            async for part in answer:
                yield msgspec.msgpack.encode(part) if isinstance(part, Head) else part
        except ReplicaLost:
            yield None
        finally:
            await answer.aclose()

    async def stop(self, timeout_s: float) -> None:
        """End the server process, letting it finish what it computes."""
        await self._replica.stop(timeout_s)


class RayBackend:
    """The front's view of one Serve deployment."""

    def __init__(self, index: int, handle: Any) -> None:  # ray.serve.handle.DeploymentHandle
        self._index = index
        self._pid = 0
        self._handle = handle
        self._stream = handle.options(stream=True)
        self.was_ready = False
        self.exit_code: int | None = None  # Serve replaces replicas by itself, so none has ended for good

    async def check(self) -> bool:
        """Whether the replica's server is ready; not while Serve starts another one."""
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                ready, node, actor, server = await self._handle.ready.remote()
        except Exception:  # whatever Ray says of a lost actor, a full queue or a lost node: not ready
            return False
        if actor != self._pid:
            self._pid = actor
            log("placed", replica=self._index, pid=actor, server_pid=server, node=node)
        self.was_ready = self.was_ready or ready
        return bool(ready)

    async def exchange(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """See `upstream.exchange`."""
        answer = self._stream.exchange.remote(msgspec.msgpack.encode(call))
        head = True
        whole = False
        try:
            async for part in answer:
                if part is None:
                    raise ReplicaLost("the replica's server ended")
                yield msgspec.msgpack.decode(part, type=Head) if head else part
                head = False
            whole = True
        except ReplicaLost:
            raise
        except Exception as error:  # Ray names a lost actor in several ways, and some are no RayError
            raise ReplicaLost(f"Ray lost the replica: {type(error).__name__}") from None
        finally:
            if not whole:
                answer.cancel()

    async def stop(self, timeout_s: float) -> None:
        """End the replica's server; the deployment is deleted with the others, by `shut_down`."""
        try:
            async with asyncio.timeout(timeout_s + 1):
                await self._handle.stop.remote(timeout_s)
        except Exception:
            return  # it is lost already, and Serve is shut down next

    def kill(self) -> None:
        """Nothing: `shut_down` ends all of them."""


def require_ray() -> None:
    """Check that Ray Serve is there.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise ConfigError("--engine ray needs Ray Serve: pip install 'llmc[ray]', or use --engine process")


def start(settings: ServerSettings, count: int, command: tuple[str, ...] = CHILD_COMMAND) -> list[RayBackend]:
    """Deploy `count` replicas on the cluster of RAY_ADDRESS, or on one of this machine started here. Blocks until they are placed.

    Raises:
        ConfigError: Ray Serve cannot place them.
    """
    import ray
    from ray import serve

    ray.init(include_dashboard=False, logging_level=logging.WARNING, namespace="llmc", ignore_reinit_error=True)
    serve.start(http_options={"location": "NoServer"})
    deployment = serve.deployment(
        RayReplica,
        max_ongoing_requests=_MANY,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},  # the operator says how many there are
    )
    encoded = msgspec.json.encode(settings)
    backends = []
    try:
        for index in range(count):
            bound = deployment.options(name=f"replica-{index}").bind(encoded, command)
            backends.append(RayBackend(index, serve.run(bound, name=f"llmc-{index}", route_prefix=None)))
    except RuntimeError as error:
        raise ConfigError(f"Ray Serve could not place replica {len(backends)} of {count}: {error}") from None
    return backends


def shut_down() -> None:
    """Delete the deployments, and the cluster if it was started here."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    serve.shutdown()
    ray.shutdown()
