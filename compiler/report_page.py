"""The report as a page and as files. No torch: `llmc report` draws the pages of artifacts that are there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmc.compiler.cuda.report import COLUMNS, table_rows
from llmc.compiler.report_svg import activations_svg, layer_svg, roofline_svg
from llmc.compiler.stages import Stage
from llmc.config.human import human_bytes

_PARTS = {"weights": "weights", "images": "code", "programs": "code", "plans": "code", "tokenizer": "tokenizer", "report": "report"}


def render_html(report: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """One self-contained page; no script, nothing fetched.

    Args:
        report: `report.facts`, or a report.json of this version or an earlier one.
        measured: `measured_facts` of the compile, and what `llmc bench` found where it was asked: "kernels", "pass_gain", "pass_kl".
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = human_bytes
    environment.filters["signed_bytes"] = signed_bytes
    environment.filters["count"] = lambda n: f"{n:,}".replace(",", " ")
    environment.globals.update(layer_svg=layer_svg, roofline_svg=roofline_svg, spans=spans, startup_spans=startup_spans)
    environment.globals.update(gpu_rows=table_rows, gpu_columns=COLUMNS, gpu_padding=gpu_padding)
    environment.globals.update(activations_svg=activations_svg, close_bound=close_bound, choice_text=choice_text)
    environment.globals.update(memory_plan=memory_plan, contents=contents, kernel_name=kernel_name, roof_points=roof_points)
    source = (files("llmc.compiler") / "report_template.html").read_text(encoding="utf-8")
    whole = {"layer": None, "kernels": [], "quantization": None, "kv_quantization": None, "gpu": None, "predicted": None, **report}
    whole = {"activations": None, "choice": "", **whole}
    return environment.from_string(source).render(report=whole, measured=measured)


def report_files(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The artifact's report/ folder."""
    return {
        "report/report.json": (json.dumps(report, indent=2, sort_keys=True) + "\n").encode(),
        "report/report.html": render_html(report).encode(),
    }


def write_measured(folder: Path, report: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Write the report with times into `folder`; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": json.dumps({**report, "measured": measured}, indent=2, sort_keys=True) + "\n",
        "report.html": render_html(report, measured),
    }
    for name, content in contents.items():
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / name)


def measured_facts(
    stages: Sequence[Stage],
    *,
    files: Mapping[str, int],
    toolchain: Mapping[str, str],
    startup_ms: Mapping[str, float],
) -> dict[str, Any]:
    """Times and sizes of this very compile.

    Args:
        files: path in the artifact -> bytes.
        startup_ms: stages of the start for the canary run; empty where there was none.
    """
    return {
        "stages": [{"name": s.name, "seconds": round(s.seconds, 3), "detail": s.detail} for s in stages],
        "seconds": round(sum(s.seconds for s in stages), 3),
        "artifact_bytes": sum(files.values()),
        "toolchain": dict(toolchain),
        "files": dict(files),
        "startup_ms": dict(startup_ms),
    }


def spans(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages that follow each other, as parts of the whole: start and width in percent."""
    whole = sum(stage["seconds"] for stage in stages) or 1.0
    found, start = [], 0.0
    for stage in stages:
        found.append({**stage, "start": round(100 * start / whole, 2), "width": round(100 * stage["seconds"] / whole, 2)})
        start += stage["seconds"]
    return found


def startup_spans(startup_ms: Mapping[str, float]) -> list[dict[str, Any]]:
    """Stages of a start. "a.b" runs inside "a", from its beginning, side by side with its other parts."""
    whole = sum(ms for name, ms in startup_ms.items() if "." not in name) or 1.0
    found, start = [], 0.0
    for name in (name for name in startup_ms if "." not in name):
        for member in (name, *(other for other in startup_ms if other.startswith(name + "."))):
            width = round(100 * startup_ms[member] / whole, 2)
            found.append({"name": member, "ms": startup_ms[member], "start": round(100 * start / whole, 2), "width": width})
        start += startup_ms[name]
    return found


def memory_plan(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What serving takes as the number of full sequences grows: bytes of weights and KV, and their share of the largest row."""
    memory, limits = report["memory"], report["limits"]
    most = limits["max_num_seqs"]
    counts = sorted({0, 1, min(8, most), min(32, most), most})
    rows = []
    for count in counts:
        kv = count * memory["kv_bytes_per_full_sequence"]
        rows.append({"sequences": count, "weights": memory["weights_bytes"], "kv": kv, "bytes": memory["weights_bytes"] + kv})
    top = max(row["bytes"] for row in rows) or 1
    return [{**row, "weights_share": round(100 * row["weights"] / top, 2), "kv_share": round(100 * row["kv"] / top, 2)} for row in rows]


def choice_text(choice: str, level: str) -> str:
    """ "left out: fuse-silu-mul; ..." of a value of --passes.

    Args:
        choice: "+name,-name"; not empty.
        level: as "-O3", which leaves out what did not pay.
    """
    names = {sign: [part[1:] for part in choice.replace(" ", "").split(",") if part.startswith(sign)] for sign in "-+"}
    said = [f"{what}: {', '.join(names[sign])}" for sign, what in (("-", "left out"), ("+", "added")) if names[sign]]
    why = "by --passes, or because the step was not faster with them (stage search)" if level == "-O3" else "by --passes"
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}, {why}."


def close_bound(report: Mapping[str, Any]) -> str:
    """ "; a close one's result is within ...", or nothing for a report that does not say."""
    bound = report.get("close_within")
    return "" if bound is None else f"; a close one stays within {bound['atol']:g} + {bound['rtol']:g} x the value"


def gpu_padding(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each plan the most rows that are padding: a step runs on the smallest plan of its kind that has room for it."""
    found: list[str] = []
    before: dict[str, int] = {}
    for plan in plans:
        kind, _, size = plan["size"].rpartition(" ")
        rows, smaller = int(size), before.get(kind, 0)
        before[kind] = rows
        found.append(f"{rows - smaller - 1} of {rows}")
    return found


def contents(files: Mapping[str, int]) -> list[dict[str, Any]]:
    """Files of an artifact by what they are, the largest part first."""
    parts: dict[str, list[int]] = {}
    for path, size in files.items():
        parts.setdefault(_PARTS.get(path.split("/")[0], "manifest"), []).append(size)
    return [{"part": part, "files": len(sizes), "bytes": sum(sizes)} for part, sizes in sorted(parts.items(), key=lambda p: -sum(p[1]))]


def signed_bytes(count: int) -> str:
    """ "−1.2 MB"; nothing for none."""
    return f"{'−' if count < 0 else ''}{human_bytes(abs(count))}" if count else ""


def kernel_name(kernel: Mapping[str, Any]) -> str:
    """ "linear 1024 × 192", or "paged_attention 4 heads of 64"."""
    if kernel["kv_bytes_per_token"]:
        return f"{kernel['op']} {kernel['rows']} heads of {kernel['columns']}"
    return f"{kernel['op']} {kernel['rows']} × {kernel['columns']}"


def roof_points(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Kernels that `llmc bench kernels` timed and that compute something, as the roofline takes them."""
    return [
        {
            "flop_per_byte": row["flop"] / row["bytes"],
            "gflop_per_s": row["flop"] / row["us"] / 1e3,
            "label": f"{row['name']}, {row['rows']} rows",
        }
        for row in measured["rows"]
        if row["flop"] and row["bytes"]
    ]
