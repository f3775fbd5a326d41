"""The report of a compile: facts that the inputs decide go into the artifact, measured times beside it.

report/report.json, report/report.html     in the artifact; the same inputs give the same bytes
OUT.report/report.json, report.html        the same with times, tools and where it ran
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.kv_bytes import token_bytes
from llmc.artifacts.manifest import Manifest, QuantizationFacts
from llmc.compiler.stages import Stage
from llmc.config.human import human_bytes


def facts(manifest: Manifest, *, ops: Mapping[str, int], extern_calls: list[str]) -> dict[str, Any]:
    """What the inputs decide, as plain data.

    Args:
        manifest: complete but for its file table.
        ops: op -> how often the graph that was lowered holds it.
        extern_calls: functions outside the lowered code that it calls, kernels of ours included.
    """
    weights = sum(tensor.nbytes for tensor in manifest.tensors)
    return {
        "model": {
            "name": manifest.model.name,
            "architecture": manifest.model.architecture,
            "parameters": manifest.model.num_parameters,
            "layers": manifest.model.num_layers,
            "hidden size": manifest.model.hidden_size,
            "vocabulary": manifest.model.vocab_size,
            "dtype": manifest.model.dtype,
        },
        "target": {
            "name": manifest.target.name,
            "instruction set": manifest.target.isa,
            "level": f"-O{manifest.level}",
            "needs": ", ".join(manifest.requirements.cpu_features),
            "torch": manifest.requirements.torch or "none at run time",
        },
        "limits": {
            "max_model_len": manifest.limits.max_model_len,
            "max_num_seqs": manifest.limits.max_num_seqs,
            "max_num_batched_tokens": manifest.limits.max_num_batched_tokens,
        },
        "memory": {
            "weights_bytes": weights,
            "kv_bytes_per_token": token_bytes(manifest.kv),
            "kv_bytes_per_full_sequence": token_bytes(manifest.kv) * manifest.limits.max_model_len,
            "block_size": manifest.kv.block_size,
            "kv_groups": [f"{len(g.layers)} layers, {'window ' + str(g.window) if g.window else 'full'}" for g in manifest.kv.groups],
        },
        "passes": [
            {
                "name": p.name,
                "numerics": p.numerics,
                "matches": p.matches,
                "nodes_before": p.nodes_before,
                "nodes_after": p.nodes_after,
                "refusals": p.refusals,
            }
            for p in manifest.passes
        ],
        "ops": dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        "extern_calls": sorted(extern_calls),
        "weights": _weight_groups(manifest),
        "canaries": [
            {
                "prompt_tokens": len(c.prompt_token_ids),
                "compared": sum(m > manifest.canary_tolerance for m in c.margins),
                "too_close": sum(m <= manifest.canary_tolerance for m in c.margins),
                "smallest_margin": min(c.margins, default=None),
            }
            for c in manifest.canaries
        ],
        "chat_template": manifest.tokenizer.template_parity,
        "quantization": None if manifest.quantization is None else _quantization(manifest.quantization),
    }


def _quantization(quantization: QuantizationFacts) -> dict[str, Any]:
    widths = Counter(quantization.tensors.values())
    return {
        "scheme": quantization.scheme,
        "group": quantization.group,
        "matrices": {f"{bits} bits": count for bits, count in sorted(widths.items())},
        "calibration_tokens": quantization.calibration_tokens,
        "reference_perplexity": quantization.reference_perplexity,
        "perplexity": quantization.perplexity,
        "mean_kl": quantization.mean_kl,
    }


def _weight_groups(manifest: Manifest) -> list[dict[str, Any]]:
    """Bytes of the weights by what they are: names with their layer numbers taken out."""
    groups: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for tensor in manifest.tensors:
        kind = ".".join("*" if part.isdigit() else part for part in tensor.name.split("."))
        groups[kind] += nbytes_of(tensor.dtype, tensor.shape)
        counts[kind] += 1
    return [{"kind": kind, "tensors": counts[kind], "bytes": size} for kind, size in groups.most_common()]


def render_html(report: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """One self-contained page; no script, nothing fetched."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = human_bytes
    environment.filters["count"] = lambda n: f"{n:,}".replace(",", " ")
    source = (files("llmc.compiler") / "report_template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report, measured=measured)


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


def measured_facts(stages: list[Stage], *, size_bytes: int, toolchain: Mapping[str, str]) -> dict[str, Any]:
    """Times and sizes of this very compile."""
    return {
        "stages": [{"name": s.name, "seconds": round(s.seconds, 3), "detail": s.detail} for s in stages],
        "seconds": round(sum(s.seconds for s in stages), 3),
        "artifact_bytes": size_bytes,
        "toolchain": dict(toolchain),
    }
