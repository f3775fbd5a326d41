"""The report of a compile: facts that the inputs decide go into the artifact, measured times beside it.

report/report.json, report/report.html     in the artifact; the same inputs give the same bytes
OUT.report/report.json, report.html        the same with times, tools and where it ran
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
import torch
from torch.fx import GraphModule

from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.kv_bytes import token_bytes
from llmc.artifacts.manifest import Manifest, QuantizationFacts
from llmc.compiler.canary import checked_positions
from llmc.compiler.report_layer import activations, kernels, layer_graph
from llmc.compiler.report_page import measured_facts, report_files, write_measured
from llmc.passes.tolerances import TOLERANCES

__all__ = ["facts", "measured_facts", "report_files", "write_measured"]


def facts(
    manifest: Manifest,
    *,
    ops: Mapping[str, int],
    extern_calls: list[str],
    captured: GraphModule | None = None,
    lowered: GraphModule | None = None,
) -> dict[str, Any]:
    """What the inputs decide, as plain data.

    Args:
        manifest: complete but for its file table.
        ops: op -> how often the graph that was lowered holds it.
        extern_calls: functions outside the lowered code that it calls, kernels of ours included.
        captured: the graph before any pass, and
        lowered: after the last: for the picture of a layer and the kernels' bytes.
    """
    weights = sum(tensor.nbytes for tensor in manifest.tensors)
    kv_token = token_bytes(manifest.kv)
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
            "executor": ", ".join(f"{entry.name}: {entry.executor}" for entry in manifest.entries),
            "code by": manifest.op_implementations.get("everything else", "llmc"),
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
            "kv_bytes_per_token": kv_token,
            "kv_bytes_per_full_sequence": kv_token * manifest.limits.max_model_len,
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
        "choice": str(manifest.settings.get("passes") or ""),  # the value of --passes, what -O3 left out included
        "layer": _layer(manifest, captured, lowered),
        "kernels": [] if lowered is None else kernels(lowered),
        "activations": None if lowered is None else activations(lowered),
        "close_within": asdict(TOLERANCES[getattr(torch, manifest.model.dtype)]),
        "ops": dict(sorted(ops.items(), key=lambda item: (-item[1], item[0]))),
        "extern_calls": sorted(extern_calls),
        "weights": _weight_groups(manifest),
        "canaries": [
            {
                "prompt_tokens": len(c.prompt_token_ids),
                **checked_positions([c]),
                "smallest_margin": min(c.margins, default=None),
            }
            for c in manifest.canaries
        ],
        "chat_template": manifest.tokenizer.template_parity,
        "quantization": None if manifest.quantization is None else _quantization(manifest.quantization),
        "kv_quantization": None if manifest.kv_quantization is None else msgspec.to_builtins(manifest.kv_quantization),
    }


def _layer(manifest: Manifest, captured: GraphModule | None, lowered: GraphModule | None) -> dict[str, Any] | None:
    """A decoder layer before and after the passes: the second, or the first of a model with fewer than three."""
    if captured is None or lowered is None:
        return None
    number = min(1, max(0, manifest.model.num_layers - 2))
    before, after = layer_graph(captured, number), layer_graph(lowered, number)
    return None if before is None or after is None else {"number": number, "before": before, "after": after}


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
        "calibration": None if quantization.calibration is None else msgspec.to_builtins(quantization.calibration),
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
