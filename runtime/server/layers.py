"""The layers between a connection and an application: what one server has, the front before replicas has too."""

from __future__ import annotations

from typing import Any

from starlette.middleware.cors import CORSMiddleware

from llmc.runtime.server.auth import AuthMiddleware, KeyCheck
from llmc.runtime.server.limits import BodyMiddleware
from llmc.runtime.server.messages_frame import MessagesFrame
from llmc.runtime.server.settings import ServerSettings


def guarded(app: Any, settings: ServerSettings) -> Any:
    """From the outside in: CORS if allowed, the frame of errors at /v1/messages, keys, body limits, then the ASGI application `app`."""
    layers: Any = BodyMiddleware(app, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    layers = AuthMiddleware(layers, KeyCheck(settings.api_keys), settings.root_path)
    layers = MessagesFrame(layers, settings.root_path)
    if settings.allowed_origins:
        # Outside the keys: a browser's preflight carries none.
        layers = CORSMiddleware(
            layers,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )
    return layers
