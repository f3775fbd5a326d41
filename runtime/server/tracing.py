"""OpenTelemetry traces: one span per HTTP request, sent by OTLP over HTTP (`--otlp-traces-endpoint`).

The libraries are an extra, imported only when the flag is given. A client's `traceparent` makes the span part of its trace. Spans carry
counts and times, under the names of OpenTelemetry's conventions for HTTP and for generative AI, and no text of a prompt or an answer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from llmc.errors import ConfigError

_SEEN_HEADERS = ("traceparent", "tracestate")


class Tracing:
    """Makes spans and sends them in the background; spans that cannot be delivered are dropped.

    Args:
        endpoint: URL of the collector; without a path, /v1/traces is meant.
        model_name: attribute of every span.

    Raises:
        ConfigError: no URL, or the extra is not installed.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"otlp_traces_endpoint={endpoint!r} is no URL; write for example http://127.0.0.1:4318/v1/traces")
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"otlp_traces_endpoint needs the extra otel ({error.name} is missing): pip install 'llmc[otel]'") from None
        url = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "llmc"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("llmc")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace
        self._model = model_name

    @contextlib.contextmanager
    def request(self, scope: Any) -> Iterator[None]:
        """A span around one request; what is known at its end is read from the scope."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = self._propagator.extract({name: headers[name] for name in _SEEN_HEADERS if name in headers})
        span = self._tracer.start_span("llm_request", context=context, kind=self._trace.SpanKind.SERVER, start_time=time.time_ns())
        try:
            yield
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            status = scope.get("llmc.status", 0)
            span.update_name(f"{scope['method'][:16]} {route}")
            span.set_attributes(
                {
                    "http.request.method": scope["method"][:16],
                    "http.route": route,
                    "http.response.status_code": status,
                    "gen_ai.request.id": scope["llmc.request_id"],
                    "gen_ai.response.model": self._model,
                    **_of_generation(scope.get("llmc.generation")),
                }
            )
            if status >= 500 or status == 0:
                span.set_status(self._trace.StatusCode.ERROR)
            span.end()

    def close(self) -> None:
        """Send what is left; waits a few seconds at most."""
        self._provider.force_flush(timeout_millis=3000)
        self._provider.shutdown()


def _of_generation(generation: Any) -> dict[str, float | int]:
    if generation is None:
        return {}
    times = {
        "gen_ai.latency.time_to_first_token": "time_to_first_token_ms",
        "gen_ai.latency.e2e": "end_to_end_ms",
        "gen_ai.latency.time_per_output_token": "time_per_output_token_ms",
    }
    found = generation.timing()
    return {
        "gen_ai.usage.prompt_tokens": generation.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": generation.num_output_tokens,
        **{name: found[key] / 1000 for name, key in times.items() if found[key] is not None},
    }
