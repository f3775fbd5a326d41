"""What every handler works with, complete before the first request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.engine_client import EngineClient
from llmc.runtime.server.metrics import Metrics
from llmc.runtime.server.served_model import ServedModel
from llmc.runtime.server.settings import ServerSettings

_INLINE_CHARS = 16 * 1024  # longer texts are encoded in a thread, so that they do not hold up the streams


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """The front process's parts."""

    settings: ServerSettings
    model: ServedModel
    client: EngineClient
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    encoders: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    def check_model(self, name: str | None) -> None:
        """Refuse a model name that is not served here; none means ours."""
        if name is not None and name not in self.model.names:
            served = ", ".join(self.model.names[:5])
            raise RequestRejected(f"the model does not exist here; served is: {served}", status=404, param="model", code="model_not_found")

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together, known once the engine is ready."""
        if self.client.ready is None:
            raise RequestRejected("the model is being loaded; try again later", status=503, code="loading")
        return self.client.ready.max_model_len

    def now(self) -> int:
        """Seconds since 1970, for `created`."""
        return int(time.time())

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        if len(text) <= _INLINE_CHARS:
            return self.model.tokenizer.encode(text, add_special_tokens)
        async with self.encoders:
            return await asyncio.to_thread(self.model.tokenizer.encode, text, add_special_tokens)


def tenant_of(request: Request) -> str:
    """The prefix-cache salt of the request's API key."""
    return request.scope.get("llmc.tenant", "")
