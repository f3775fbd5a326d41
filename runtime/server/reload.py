"""POST /v1/weights: another artifact of the same model in the place of the one that is served, without restarting the server.

Only over a Unix socket, where the file's mode says who may, and only from folders the operator named: loading an artifact runs its code.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

from starlette.requests import Request

from llmc.artifacts.verify import open_artifact
from llmc.errors import LlmcError, RequestRejected
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.front import Front
from llmc.runtime.server.logs import log
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas_weights import WeightsRequest
from llmc.runtime.server.served_model import ServedModel, load_served_model
from llmc.runtime.server.settings import ServerSettings


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """What turns text into ids: a request that is on its way when weights change must mean the same afterwards."""

    vocab_size: int
    tokenizer_sha256: str | None
    template_sha256: str | None


def _text_of(settings: ServerSettings) -> _Text:
    trust = Path(settings.trust) if settings.trust is not None else None
    with open_artifact(settings.artifact, require_signature=settings.require_signature, trust=trust) as artifact:
        manifest = artifact.manifest
        digests = {record.path: record.sha256 for record in manifest.files}
        facts = manifest.tokenizer
        return _Text(
            manifest.model.vocab_size,
            digests[facts.tokenizer_json] if facts.tokenizer_json is not None else None,
            digests[facts.chat_template] if facts.chat_template is not None else None,
        )


class Reload:
    """Changes which artifact is served. One change at a time.

    Args:
        front: whose `model` is replaced.
        engine: fields the engine process is launched with; their "artifact" is replaced.

    Raises:
        ArtifactError: the artifact that is served cannot be read.
    """

    def __init__(self, front: Front, engine: dict[str, Any]) -> None:
        self._front = front
        self._engine = engine
        self._settings = front.settings
        self._allowed = [Path(os.path.realpath(folder)) for folder in front.settings.allow_weights]
        self._text = _text_of(front.settings)
        self._busy = asyncio.Lock()

    async def replace(self, artifact: str) -> None:
        """Serve `artifact` from now on. Running requests finish first, with the weights they began with.

        Raises:
            RequestRejected: it lies elsewhere, is damaged or another model's, or its engine does not start; the former one is served then.
        """
        if self._busy.locked():
            raise RequestRejected("weights are being replaced at this moment; try again later", status=503, code="busy")
        async with self._busy:
            path = os.path.realpath(artifact)
            if not any(Path(path).is_relative_to(folder) for folder in self._allowed):
                raise RequestRejected("the artifact lies in none of the folders of --allow-weights", param="artifact", code="not_allowed")
            model = await asyncio.to_thread(self._checked, path)
            former = self._engine["artifact"]
            await self._front.client.sleep(self._settings.shutdown_timeout_s)
            self._engine["artifact"] = path
            try:
                await self._front.client.wake_up()
            except RequestRejected as error:
                self._engine["artifact"] = former
                await self._front.client.wake_up()
                raise RequestRejected(f"the former artifact is served again: {error}", status=500, code="reload_failed") from None
            self._front.model = dataclasses.replace(model, names=self._front.model.names)
            log("weights_replaced", artifact=path)

    def _checked(self, path: str) -> ServedModel:
        settings = dataclasses.replace(self._settings, artifact=path)
        try:
            text, model = _text_of(settings), load_served_model(settings)
        except LlmcError as error:
            raise RequestRejected(f"the artifact cannot be served: {error}", param="artifact", code="bad_artifact") from None
        if text != self._text:
            raise RequestRejected(
                "the artifact is of another model: its vocabulary, tokenizer or chat template differs; start another server for it",
                param="artifact",
                code="other_model",
            )
        defaults = model.generation_defaults | self._settings.override_generation_config
        return dataclasses.replace(model, generation_defaults=defaults)


def weights_router(reload: Reload) -> Router:
    """The route; only a server on a Unix socket has it."""
    router = Router()

    @router.post("/v1/weights")
    async def weights(request: Request) -> Any:
        """Serve another artifact of the same model. Answers when its first request can be worked on."""
        body = parse_body(await request.body(), WeightsRequest)
        await reload.replace(body.artifact)
        return json_answer({"status": "replaced"})

    return router
