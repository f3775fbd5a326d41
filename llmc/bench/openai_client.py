"""The smallest client that can time an OpenAI-compatible server: one streamed completion over http.client."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from llmc.bench.processes import RunningServer
from llmc.errors import ConfigError, InternalError

KEY_VARIABLE = "OPENAI_API_KEY"


def connect(base_url: str, *, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a server, and the path its API stands under.

    Raises:
        ConfigError: no http or https address.
    """
    parts = urlsplit(base_url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--base-url {base_url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url {base_url!r} is no address of a server; write for example http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, port, timeout=timeout_s), parts.path.rstrip("/").removesuffix("/v1")


def headers() -> dict[str, str]:
    """JSON, and the key of the environment variable OPENAI_API_KEY if there is one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def stream_completion(base_url: str, body: Mapping[str, Any], *, timeout_s: float = 600.0) -> Iterator[tuple[float, dict[str, Any]]]:
    """POST /v1/completions with `stream`; yields (arrival in perf_counter seconds, event).

    Raises:
        OSError: not reachable, an answer other than 200, or an error event.
    """
    connection, root = connect(base_url, timeout_s=timeout_s)
    try:
        connection.request("POST", f"{root}/v1/completions", json.dumps({**body, "stream": True}), headers())
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
        for raw in response:
            if raw.startswith(b"data: ") and not raw.startswith(b"data: [DONE]"):
                event = json.loads(raw[6:])
                if "error" in event:
                    raise OSError(f"error event: {str(event['error'])[:300]}")
                yield time.perf_counter(), event
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no usable answer: {type(error).__name__} {error}") from error
    finally:
        connection.close()


def served_model(base_url: str) -> str:
    """The name of the first model a server says it serves.

    Raises:
        ConfigError: no server there, or no list of models.
    """
    connection, root = connect(base_url, timeout_s=10.0)
    try:
        connection.request("GET", f"{root}/v1/models", headers=headers())
        response = connection.getresponse()
        answer = response.read(1 << 20)
        if response.status != 200:
            raise ConfigError(f"{base_url}/v1/models answers {response.status}; name the model with --model, the key with {KEY_VARIABLE}")
        return str(json.loads(answer)["data"][0]["id"])
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"{base_url}: no server answers there ({error}); start one, or name an ARTIFACT to serve") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{base_url}/v1/models is no list of models; name the model with --model") from error
    finally:
        connection.close()


def first_token_seconds(running: RunningServer, body: Mapping[str, Any], *, timeout_s: float = 600.0) -> float:
    """Seconds from the spawn of a server to the first token of a request that is tried every 5 ms.

    Raises:
        InternalError: the server ended, or gave no token in time.
    """
    deadline = time.perf_counter() + timeout_s
    while time.perf_counter() < deadline:
        if running.process.poll() is not None:
            raise InternalError(f"the server ended with status {running.process.returncode}:\n{running.log_tail()}")
        try:
            for arrival, event in stream_completion(running.base_url, body):
                if event.get("choices"):
                    return arrival - running.spawned
        except OSError:
            time.sleep(0.005)  # not up yet
    raise InternalError(f"no token within {timeout_s:.0f} s:\n{running.log_tail()}")
