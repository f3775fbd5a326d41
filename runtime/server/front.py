"""What every handler works with, complete before the first request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.engine_client import EngineClient
from llmc.runtime.lora import AdapterPath
from llmc.runtime.server.metrics import Metrics
from llmc.runtime.server.served_model import ServedModel
from llmc.runtime.server.settings import ServerSettings

T = TypeVar("T")
_INLINE_SIZE = 16 * 1024  # characters or tokens; about 10 ms of encoding


@dataclass(kw_only=True, slots=True)
class Front:
    """The front process's parts. Only `model` ever changes, by reload.py while no request runs, and `adapters`."""

    settings: ServerSettings
    model: ServedModel
    client: EngineClient
    metrics: Metrics
    adapters: dict[str, AdapterPath] = field(default_factory=dict)  # by name; changed by adapters.py alone
    created: int = field(default_factory=lambda: int(time.time()))
    workers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def check_model(self, name: str | None) -> str | None:
        """Refuse a model name that is not served here; none means ours. Returns the LoRA adapter it names, if it does."""
        if name in self.adapters:
            return name
        if name is not None and name not in self.model.names:
            served = ", ".join([*self.model.names, *self.adapters][:5])
            raise RequestRejected(f"the model does not exist here; served is: {served}", status=404, param="model", code="model_not_found")
        return None

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together, known once the engine is ready."""
        if self.client.ready is None:
            self.client.check_state()
            raise RequestRejected("the model is being loaded; try again later", status=503, code="loading")
        return self.client.ready.max_model_len

    def now(self) -> int:
        """Seconds since 1970, for `created`."""
        return int(time.time())

    async def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""

        def encode_all() -> list[list[int]]:
            return [self.model.tokenizer.encode(text, add_special_tokens) for text in texts]

        return await self.aside(encode_all, size=sum(map(len, texts)))

    async def aside(self, work: Callable[[], T], *, size: int) -> T:
        """Do work over `size` characters or tokens, in a thread where it would hold up the streams."""
        if size <= _INLINE_SIZE:
            return work()
        async with self.workers:
            return await asyncio.to_thread(work)


def cache_salt_of(request: Request, own: str | None) -> str:
    """The prefix-cache salt: that of the request's API key (hexadecimal or empty), and the client's own within it."""
    tenant: str = request.scope.get("llmc.tenant", "")
    return tenant if own is None else f"{tenant}/{own}"
