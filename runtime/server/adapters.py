"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs.

Only where the operator named folders: an adapter decides what others' requests for its name are answered with.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from llmc.errors import RequestRejected
from llmc.runtime.lora import AdapterPath
from llmc.runtime.messages import AdapterChange
from llmc.runtime.server.errors import name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.logs import log
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas_adapters import LoadAdapterRequest, UnloadAdapterRequest


class Adapters:
    """Changes which adapters are served, one change at a time.

    Args:
        front: whose `adapters` change.
        engine: fields the engine process is launched with; "lora_modules" follows, so that a restarted engine has them too.
    """

    def __init__(self, front: Front, engine: dict[str, Any]) -> None:
        self._front = front
        self._engine = engine
        self._allowed = [Path(os.path.realpath(folder)) for folder in front.settings.allow_runtime_lora_updating]
        self._busy = asyncio.Lock()

    async def load(self, name: str, path: str, request_id: str) -> None:
        """Serve the adapter in the folder `path` under `name`.

        Raises:
            RequestRejected: the name is taken, the folder is none of the allowed ones, or the adapter cannot be served.
        """
        async with self._busy:
            if name in self._front.adapters or name in self._front.model.names:
                raise RequestRejected(f"{name!r} is served already; unload it first, or take another name", param="lora_name")
            folder = await asyncio.to_thread(os.path.realpath, path)
            if not any(Path(folder).is_relative_to(allowed) for allowed in self._allowed):
                raise RequestRejected(
                    "the adapter lies in none of the folders of --allow-runtime-lora-updating", param="lora_path", code="not_allowed"
                )
            adapter = AdapterPath(name=name, path=folder)
            await self._front.client.change_adapter(AdapterChange(request_id=f"{request_id}-load", load=adapter))
            self._front.adapters[name] = adapter
            self._remember()
            log("adapter_loaded", adapter=name, path=folder)

    async def unload(self, name: str, request_id: str) -> None:
        """Take no more requests for an adapter; running ones finish.

        Raises:
            RequestRejected: there is no such adapter.
        """
        async with self._busy:
            if name not in self._front.adapters:
                raise RequestRejected(f"there is no adapter {name!r}", status=404, param="lora_name", code="model_not_found")
            await self._front.client.change_adapter(AdapterChange(request_id=f"{request_id}-unload", unload=name))
            del self._front.adapters[name]
            self._remember()
            log("adapter_unloaded", adapter=name)

    def _remember(self) -> None:
        self._engine["lora_modules"] = [
            {"name": one.name, "path": one.path, "base_model_name": one.base_model_name} for one in self._front.adapters.values()
        ]


def adapters_router(adapters: Adapters) -> Router:
    """The routes; only a server with --allow-runtime-lora-updating has them."""
    router = Router()

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Any:
        """Serve another LoRA adapter. Answers when requests may name it."""
        body = parse_body(await request.body(), LoadAdapterRequest)
        await adapters.load(body.lora_name, body.lora_path, request.scope["llmc.request_id"])
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Any:
        """Take no more requests for a LoRA adapter."""
        body = parse_body(await request.body(), UnloadAdapterRequest)
        name_fields(request.scope, model="lora_name")
        await adapters.unload(body.lora_name, request.scope["llmc.request_id"])
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
