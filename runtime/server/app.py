"""The HTTP application: routes, error answers, and the layers every request passes.

From the outside in: context (id, log, last word), CORS if allowed, keys, body limits, then the routes.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmc.errors import RequestRejected
from llmc.runtime.server.adapters import Adapters, adapters_router
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.anthropic_messages import messages_router
from llmc.runtime.server.context import ContextMiddleware
from llmc.runtime.server.embeddings import embeddings_router
from llmc.runtime.server.errors import error_response, rejection_response
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import ClientGone
from llmc.runtime.server.health import operator_router
from llmc.runtime.server.layers import guarded
from llmc.runtime.server.openai_chat import chat_router
from llmc.runtime.server.openai_completions import completions_router
from llmc.runtime.server.openai_responses import responses_router
from llmc.runtime.server.playground_page import playground_router
from llmc.runtime.server.reload import Reload, weights_router
from llmc.runtime.server.routes import Router
from llmc.runtime.server.tokenize import tokenize_router
from llmc.runtime.server.tracing import Tracing

_MESSAGES = {404: "there is nothing at this path; GET /v1/models lists what is served", 405: "this path does not take this method"}


def build_app(front: Front, tracing: Tracing | None = None, reload: Reload | None = None, adapters: Adapters | None = None) -> Any:
    """The whole ASGI application of a server."""
    settings = front.settings
    app = _Application(settings.root_path)
    app.router.redirect_slashes = False  # a redirect would be built from the Host header
    generating = (chat_router, completions_router, responses_router, messages_router)
    for make_router in (*generating, embeddings_router, tokenize_router, operator_router):
        app.router.routes += make_router(front).routes
    if reload is not None:
        app.router.routes += weights_router(reload).routes
    if adapters is not None:
        app.router.routes += adapters_router(adapters).routes
    if not settings.disable_docs:
        app.router.routes += playground_router(front).routes + _description_router(app, settings.root_path).routes
    _add_error_answers(app)
    return ContextMiddleware(guarded(app, settings), front.metrics, access_log=not settings.disable_access_log, tracing=tracing)


class _Application(Starlette):
    """Answers under its own paths and under `root_path` followed by them, for a proxy that adds it or leaves it."""

    def __init__(self, root_path: str) -> None:
        super().__init__()
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._root_path:
            scope["root_path"] = self._root_path
        await super().__call__(scope, receive, send)


def _description_router(app: Starlette, root_path: str) -> Router:
    """GET /openapi.json, made when it is first asked for."""
    router = Router()
    made: list[dict[str, Any]] = []

    @router.get("/openapi.json")
    async def openapi(_request: Request) -> Response:
        if not made:
            from llmc.runtime.server.openapi import describe  # most servers are never asked

            made.append(describe(app.router.routes, root_path))
        return json_answer(made[0])

    return router


def _add_error_answers(app: Starlette) -> None:
    async def rejected(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestRejected)
        return rejection_response(error, request.scope)

    async def http_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = _MESSAGES.get(error.status_code, "the request was refused")
        return error_response(message, status=error.status_code, code=code, headers=dict(error.headers or {}))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # for the log; nobody reads it

    async def failed(_request: Request, _error: Exception) -> Response:
        return error_response("the server failed on this request; its log has the reason", status=500)  # ContextMiddleware logs it

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(RequestRejected, rejected)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, gone)
