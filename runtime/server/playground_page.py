"""GET /: a static page to try the model with. Three files, no other resource, a policy that forbids the rest."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from llmc.runtime.server.front import Front
from llmc.runtime.server.routes import Handler, Router

_FOLDER = Path(__file__).parent / "playground"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/playground/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
}
# Nothing from elsewhere, nothing inline, in no frame; trusted types: no script may turn text into HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


def playground_router(_front: Front) -> Router:
    """The page's routes. With keys set it is not reachable without one, like every other path."""
    router = Router()
    for path, (name, media_type) in _FILES.items():
        router.get(path)(_page(_FOLDER / name, media_type))
    return router


def _page(file: Path, media_type: str) -> Handler:
    async def playground(_request: Request) -> Response:
        return Response(file.read_bytes(), media_type=media_type, headers=_HEADERS)

    return playground
