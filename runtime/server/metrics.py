"""Prometheus metrics under the names vLLM's dashboards know, prefix `llmc:`. No label comes from client data."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llmc.runtime.engine_client import EngineClient
from llmc.runtime.messages import EngineStats

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)
_ENGINE_COUNTERS = {
    "prefix_queries_tokens": ("llmc:prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits_tokens": ("llmc:prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("llmc:num_preemptions", "Sequences whose blocks were taken and that were computed again."),
    "spec_num_drafts": ("llmc:spec_decode_num_drafts", "Steps of a sequence that had guesses (speculative decoding)."),
    "spec_draft_tokens": ("llmc:spec_decode_num_draft_tokens", "Guessed tokens that were computed."),
    "spec_accepted_tokens": ("llmc:spec_decode_num_accepted_tokens", "Guessed tokens that were right."),
    "steps_sampled_on_device": ("llmc:steps_sampled_on_device", "Steps whose tokens were chosen on the GPU."),
    "steps_sampled_on_host": ("llmc:steps_sampled_on_host", "Steps on a GPU whose tokens the host chose from the logits."),
    "steps_ahead": ("llmc:steps_ahead", "Steps begun on the GPU before the host knew the tokens of the step before."),
    "step": ("llmc:engine_steps", "Steps the engine made."),
}


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self, model_name: str, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.prompt_tokens = self._counter("llmc:prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("llmc:generation_tokens", "Tokens generated.")
        self._success = Counter(
            "llmc:request_success", "Sequences that ended, by reason.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.http_requests = Counter("llmc:http_requests", "HTTP answers.", ["handler", "status"], registry=self.registry)
        self.time_to_first_token = self._histogram("llmc:time_to_first_token_seconds", "Request accepted to first token.", _SECONDS)
        self.inter_token_latency = self._histogram("llmc:inter_token_latency_seconds", "Gap between two tokens.", _SECONDS)
        self.time_per_output_token = self._histogram(
            "llmc:request_time_per_output_token_seconds", "(End-to-end - first token) / (tokens - 1).", _SECONDS
        )
        self.e2e_latency = self._histogram("llmc:e2e_request_latency_seconds", "Request accepted to its last token.", _SECONDS)
        self.queue_time = self._histogram("llmc:request_queue_time_seconds", "Request accepted to its first step.", _SECONDS)
        self.prefill_time = self._histogram("llmc:request_prefill_time_seconds", "First step to first token.", _SECONDS)
        self.decode_time = self._histogram("llmc:request_decode_time_seconds", "First token to last token.", _SECONDS)
        self.inference_time = self._histogram("llmc:request_inference_time_seconds", "First step to last token.", _SECONDS)
        self.request_prompt_tokens = self._histogram("llmc:request_prompt_tokens", "Prompt tokens per sequence.", _TOKENS)
        self.request_generation_tokens = self._histogram("llmc:request_generation_tokens", "Generated tokens per sequence.", _TOKENS)
        self.request_max_num_generation_tokens = self._histogram(
            "llmc:request_max_num_generation_tokens", "Generated tokens of a request's longest sequence.", _TOKENS
        )
        self.request_params_n = self._histogram("llmc:request_params_n", "The field n.", _SAMPLES)
        self.request_params_max_tokens = self._histogram("llmc:request_params_max_tokens", "The field max_tokens.", _TOKENS)
        self.registry.register(_EngineCollector(model_name, client))

    def ended(self, reason: str) -> None:
        """Count a sequence's end; `reason` is one of messages.FinishReason."""
        self._success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """The page Prometheus reads."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model)


class _EngineCollector:
    """The engine's own figures, read when asked. Its counters start anew with a new process; ours go on."""

    def __init__(self, model_name: str, client: EngineClient) -> None:
        self._model = model_name
        self._client = client
        self._base = dict.fromkeys(_ENGINE_COUNTERS, 0)
        self._last = dict.fromkeys(_ENGINE_COUNTERS, 0)

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        yield self._gauge("llmc:num_requests_running", "Sequences in the running batch.", stats.num_running if stats else 0)
        yield self._gauge("llmc:num_requests_waiting", "Sequences waiting for a place.", stats.num_waiting if stats else 0)
        usage = stats.kv_blocks_used / max(1, stats.kv_blocks_total) if stats else 0.0
        yield self._gauge("llmc:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        yield self._gauge("llmc:engine_restarts", "Times the engine process was started again.", self._client.num_restarts)
        yield self._gauge("llmc:front_peak_rss_bytes", "Most memory the front process held.", _peak_rss_bytes())
        ready = self._client.ready
        if ready is not None:
            info = GaugeMetricFamily("llmc:cache_config_info", "How the KV cache is cut.", labels=["block_size", "num_gpu_blocks"])
            info.add_metric([str(ready.block_size), str(ready.num_blocks)], 1)
            yield info
        if ready is not None and ready.max_loras:
            yield self._lora_info(ready.max_loras, stats)
        for field, (name, about) in _ENGINE_COUNTERS.items():
            family = CounterMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], self._total(field, stats))
            yield family

    def _total(self, field: str, stats: EngineStats | None) -> int:
        value = getattr(stats, field) if stats is not None else self._last[field]
        if value < self._last[field]:
            self._base[field] += self._last[field]
        self._last[field] = value
        return self._base[field] + value

    def _lora_info(self, max_loras: int, stats: EngineStats | None) -> GaugeMetricFamily:
        """Which adapters run and wait now, as vLLM shows it: the names are labels, the value is the time of the answer. It is one line,
        so labels never pile up; the names are the operator's."""
        labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        family = GaugeMetricFamily("llmc:lora_requests_info", "LoRA adapters of running and waiting requests.", labels=labels)
        waiting, running = (stats.waiting_loras, stats.running_loras) if stats else ([], [])
        family.add_metric([str(max_loras), ",".join(waiting), ",".join(running)], time.time())
        return family

    def _gauge(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
