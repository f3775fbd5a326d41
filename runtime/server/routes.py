"""Paths and their handlers. Starlette's routing; handlers read and check their bodies themselves, so nothing more is needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

Handler = Callable[[Request], Awaitable[Response]]


class DescribedRoute(Route):
    """A route with a sentence for /openapi.json."""

    about = ""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        match, child_scope = super().matches(scope)
        if match is not Match.NONE:
            child_scope["route"] = self  # its path, not the client's, is a metric's label
        return match, child_scope


class Router:
    """Collects routes.

    Args:
        described: whether /openapi.json names the routes.
    """

    def __init__(self, *, described: bool = True) -> None:
        self._described = described
        self.routes: list[Route] = []

    def get(self, path: str) -> Callable[[Handler], Handler]:
        """A decorator: the function answers GET (and HEAD) at `path`."""
        return self._at(path, "GET")

    def post(self, path: str) -> Callable[[Handler], Handler]:
        """A decorator: the function answers POST at `path`."""
        return self._at(path, "POST")

    def _at(self, path: str, method: str) -> Callable[[Handler], Handler]:
        def add(handler: Handler) -> Handler:
            route = DescribedRoute(path, handler, methods=[method], name=handler.__name__, include_in_schema=self._described)
            route.about = (handler.__doc__ or "").strip()
            self.routes.append(route)
            return handler

        return add
