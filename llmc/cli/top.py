"""`llmc top`: a live view of a running server, from its /metrics and /load."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich_click as click

from llmc.errors import ConfigError

_TIMEOUT_S = 5.0
_MAX_BYTES = 4 << 20
_HISTORY = 40  # figures of the little curve

_LOAD_METRICS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at a server."""

    time: float  # time.monotonic()
    load: dict[str, Any]
    values: dict[str, dict[Labels, float]]  # metric -> labels -> value

    def total(self, name: str) -> float:
        """Sum of a metric over its labels; 0 where the server has none."""
        return sum(self.values.get(name, {}).values())


@dataclass(kw_only=True, slots=True)
class View:
    """What is shown: the last sample, and what happened since the one before."""

    url: str
    now: Sample
    before: Sample | None = None
    speeds: list[float] = field(default_factory=list)

    def rate(self, name: str) -> float:
        """Per second since the sample before."""
        if self.before is None:
            return 0.0
        return max(0.0, self.now.total(name) - self.before.total(name)) / max(1e-9, self.now.time - self.before.time)

    def quantile(self, name: str, share: float) -> float | None:
        """A quantile of a histogram's observations since the sample before, of all where there were none; None: of nothing.

        Within a bucket the observations are taken as evenly spread, as Prometheus does.
        """
        buckets = _buckets(self.now, name)
        if self.before is not None:
            known = dict(_buckets(self.before, name))
            recent = [(edge, count - known.get(edge, 0.0)) for edge, count in buckets]
            buckets = recent if recent and recent[-1][1] > 0 else buckets
        if not buckets or buckets[-1][1] <= 0:
            return None
        wanted, low, below = share * buckets[-1][1], 0.0, 0.0
        for edge, count in buckets:
            if count >= wanted:
                return low if edge == float("inf") else low + (edge - low) * (wanted - below) / max(1e-9, count - below)
            low, below = edge, count
        return low


def _buckets(sample: Sample, name: str) -> list[tuple[float, float]]:
    """(upper edge, observations up to it) of a histogram, by edge, summed over the other labels."""
    sums: dict[float, float] = {}
    for labels, value in sample.values.get(name + "_bucket", {}).items():
        edge = float(dict(labels)["le"])
        sums[edge] = sums.get(edge, 0.0) + value
    return sorted(sums.items())


def look(url: str, api_key: str | None) -> Sample:
    """Ask a server.

    Raises:
        ConfigError: it does not answer, refuses, or is no llmc server.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        load = json.loads(_get(url + "/load", api_key))
        values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(_get(url + "/metrics", api_key).decode()):
            for one in family.samples:
                values.setdefault(one.name, {})[frozenset(one.labels.items())] = one.value
        load = _of_all(load["replicas"], values) if "replicas" in load else {"state": load["state"], **load}
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{url}: /load and /metrics are not those of an llmc server ({type(error).__name__}); check --url") from None
    return Sample(time=time.monotonic(), load=load, values=values)


def _of_all(replicas: list[dict[str, Any]], values: dict[str, dict[Labels, float]]) -> dict[str, Any]:
    """What /load of one server says, of all replicas behind one address."""
    ready = sum(bool(replica["ready"]) for replica in replicas)
    running, waiting, usage = (list(values.get(f"llmc:{name}", {}).values()) for name in _LOAD_METRICS)
    return {
        "state": "ready" if ready == len(replicas) else f"{ready} of {len(replicas)} replicas ready",
        "num_requests_running": int(sum(running)),
        "num_requests_waiting": int(sum(waiting)),
        "kv_cache_usage": sum(usage) / max(1, len(usage)),
    }


def _get(url: str, api_key: str | None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return bytes(answer.read(_MAX_BYTES))
    except urllib.error.HTTPError as error:
        hint = "; give --api-key" if error.code == 401 else ""
        raise ConfigError(f"{url} answered {error.code}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{url} does not answer ({reason}); is the server running there? --url names another") from None


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _curve(values: list[float]) -> str:
    """The last figures as a row of bars."""
    top = max(values, default=0.0)
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * value / top)] if top else " " for value in values)


def draw(view: View) -> Any:
    """The view as something rich can print."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    now, load = view.now, view.now.load
    names = {dict(labels).get("model_name", "?") for labels in now.values.get("llmc:num_requests_running", {})}
    head = Table.grid(padding=(0, 3))
    state = load["state"]
    colour = "green" if state == "ready" else "yellow"
    restarts = now.total("llmc:engine_restarts")
    head.add_row(f"[bold]{', '.join(sorted(names))}[/]", view.url, f"[{colour}]{state}[/]", f"{restarts:.0f} engine restarts")

    work = Table.grid(padding=(0, 2))
    work.add_column(style="dim")
    work.add_row("running", f"{load['num_requests_running']}")
    work.add_row("waiting", f"{load['num_requests_waiting']}")
    work.add_row("preempted", f"{now.total('llmc:num_preemptions_total'):.0f} in all")
    usage = float(load["kv_cache_usage"])
    work.add_row("KV cache", ProgressBar(total=1.0, completed=usage, width=20), f"{usage:.0%}")
    asked = now.total("llmc:prefix_cache_queries_total")
    hits = now.total("llmc:prefix_cache_hits_total") / asked if asked else 0.0
    work.add_row("prefix hits", ProgressBar(total=1.0, completed=hits, width=20), f"{hits:.0%}")

    speed = Table.grid(padding=(0, 2))
    speed.add_column(style="dim")
    speed.add_column(justify="right")
    speed.add_row("output", f"{view.rate('llmc:generation_tokens_total'):,.0f} tokens/s", _curve(view.speeds))
    speed.add_row("prompts", f"{view.rate('llmc:prompt_tokens_total'):,.0f} tokens/s")
    speed.add_row("ended", f"{view.rate('llmc:request_success_total'):,.1f} sequences/s")
    speed.add_row("steps", f"{view.rate('llmc:engine_steps_total'):,.1f} /s")

    times = Table(box=None, pad_edge=False, header_style="dim")
    times.add_column("")
    for title in ("p50", "p90", "p99"):
        times.add_column(title, justify="right", min_width=10)
    for title, name in (
        ("first token", "llmc:time_to_first_token_seconds"),
        ("between tokens", "llmc:inter_token_latency_seconds"),
        ("whole answer", "llmc:e2e_request_latency_seconds"),
    ):
        times.add_row(title, *(_ms(view.quantile(name, share)) for share in (0.5, 0.9, 0.99)))

    ends: dict[str, float] = {}
    for labels, value in now.values.get("llmc:request_success_total", {}).items():
        ends[dict(labels)["finished_reason"]] = ends.get(dict(labels)["finished_reason"], 0.0) + value
    answers: dict[str, float] = {}
    for labels, value in now.values.get("llmc:http_requests_total", {}).items():
        answers[dict(labels)["status"]] = answers.get(dict(labels)["status"], 0.0) + value
    counts = Table.grid(padding=(0, 2))
    counts.add_column(style="dim")
    counts.add_row("ended by", "   ".join(f"{name} {value:,.0f}" for name, value in sorted(ends.items())) or "-")
    counts.add_row("answers", "   ".join(f"{status} {value:,.0f}" for status, value in sorted(answers.items())) or "-")

    both = Table.grid(expand=True, padding=(0, 1))
    both.add_column(ratio=1)
    both.add_column(ratio=1)
    both.add_row(Panel(work, title="engine", title_align="left"), Panel(speed, title="speed", title_align="left"))
    return Group(head, both, Panel(times, title="time", title_align="left"), Panel(counts, title="since start", title_align="left"))


def views(url: str, api_key: str | None, interval_s: float) -> Iterator[View]:
    """A view now, and another after each interval."""
    view = View(url=url, now=look(url, api_key))
    while True:
        yield view
        time.sleep(interval_s)
        sample = look(url, api_key)
        view = View(url=url, now=sample, before=view.now, speeds=view.speeds)
        view.speeds = [*view.speeds, view.rate("llmc:generation_tokens_total")][-_HISTORY:]


@click.command("top")
@click.option("--url", default="http://127.0.0.1:8000", help="The server. [default: http://127.0.0.1:8000]")
@click.option("--api-key", default=None, help="Key of a server that asks for one; default: the environment's LLMC_API_KEY.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, help="Seconds between two looks. [default: 1]")
@click.option("--frames", type=click.IntRange(1), default=None, metavar="N", help="Print N views one below the other, and end.")
@click.option("--svg", type=click.Path(path_type=Path), default=None, help="With --frames: write the last view as a picture.")
def top_command(url: str, api_key: str | None, interval: float, frames: int | None, svg: Path | None) -> int:
    """Watch a running server: its work, speed, latencies and KV cache."""
    from rich.console import Console
    from rich.live import Live

    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url {url}: expected an address such as http://127.0.0.1:8000")
    if svg is not None and frames is None:
        raise ConfigError("--svg needs --frames N: the picture is of the last of them")
    found = views(url.rstrip("/"), api_key or os.environ.get("LLMC_API_KEY"), interval)
    if frames is None:
        try:
            with Live(draw(next(found)), screen=True, auto_refresh=False) as live:
                for view in found:
                    live.update(draw(view), refresh=True)
        except KeyboardInterrupt:
            pass  # how one leaves
        return 0
    console = Console(record=svg is not None, width=100 if svg is not None else None)
    for number in range(1, frames + 1):
        view = next(found)
        if svg is not None and number == frames:
            console.export_text(clear=True)
        console.print(draw(view))
    if svg is not None:
        console.save_svg(str(svg), title="llmc top")
    return 0
