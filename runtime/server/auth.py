"""API keys: with one set, every path but /health* needs it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from hmac import compare_digest
from typing import Any

from llmc.runtime.server.errors import error_response

_OPEN_PATHS = ("/health", "/health/live", "/health/ready")


class KeyCheck:
    """Knows the keys as SHA-256 digests and gives each its tenant salt."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        # Per process: a salt tells nothing about its key, and prefix-cache timing nothing across tenants.
        self._secret = secrets.token_bytes(32)

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def tenant_salt(self, presented: bytes | None) -> str | None:
        """The tenant's salt, "" where no key is asked for, None if the key is missing or wrong.

        All keys are compared, without early exit.
        """
        if not self._digests:
            return ""
        digest = hashlib.sha256(presented or b"").digest()
        matches = [compare_digest(digest, known) for known in self._digests]
        if presented is None or not any(matches):
            return None
        return hmac.new(self._secret, digest, hashlib.sha256).hexdigest()


class AuthMiddleware:
    """ASGI: default deny. Decides on scope["path"], the path that is also routed, never on a URL rebuilt from headers."""

    def __init__(self, app: Any, keys: KeyCheck, root_path: str) -> None:
        self._app = app
        self._keys = keys
        self._open = {*_OPEN_PATHS, *(root_path + path for path in _OPEN_PATHS)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        salt = self._keys.tenant_salt(_presented_key(scope["headers"]))
        if salt is None and scope["path"] not in self._open:
            answer = error_response(
                "a valid API key is required: send it as 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )
            await answer(scope, receive, send)
            return
        scope["llmc.tenant"] = salt or ""
        await self._app(scope, receive, send)


def _presented_key(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The bearer token, if exactly one Authorization header holds one; without that header Anthropic's `x-api-key`, if there is one."""
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        keys = [value for name, value in headers if name == b"x-api-key"]
        return keys[0].strip() or None if len(keys) == 1 else None
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None
