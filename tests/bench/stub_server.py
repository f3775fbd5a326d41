"""An OpenAI-compatible server in a thread, whose answers a test decides: for the load generator, which must work with any."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The parsed request -> lines of the event stream, or a status with a body.
Reply = Callable[[dict[str, Any]], Iterator[str] | tuple[int, str]]


def tokens(count: int) -> Iterator[str]:
    """A whole stream of `count` tokens and the usage."""
    for _ in range(count):
        yield "data: " + json.dumps({"choices": [{"text": "a"}]})
    yield "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": count}})
    yield "data: [DONE]"


@contextmanager
def stub_server(reply: Reply) -> Iterator[str]:
    """Gives the base URL; the server is gone afterwards."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            return

        def do_GET(self) -> None:
            self._plain(200, json.dumps({"data": [{"id": "stub"}]}))

        def do_POST(self) -> None:
            answer = reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(answer, tuple):
                self._plain(*answer)
                return
            self.send_response(200)
            self.end_headers()
            for line in answer:
                self.wfile.write(line.encode() + b"\n\n")
                self.wfile.flush()

        def _plain(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
