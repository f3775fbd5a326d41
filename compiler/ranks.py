"""What changes of a model's description when several ranks share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from llmc.artifacts.manifest import Entry
from llmc.compiler.capture import TracedModel
from llmc.errors import UnsupportedModel
from llmc.passes.runner import PassReport


def divided(traced: TracedModel, ranks: int, reports: Sequence[PassReport]) -> TracedModel:
    """The model as one rank runs it: its caches hold the rank's heads.

    Raises:
        UnsupportedModel: an attention could not be divided; says why.
    """
    kept = [node for node in traced.graph.graph.nodes if node.op == "placeholder" and node.target.startswith("k_cache")]
    heads = [int(node.meta["val"].shape[1]) for node in kept]
    if heads != [whole // ranks for whole in traced.kv.num_kv_heads] or any(whole % ranks for whole in traced.kv.num_kv_heads):
        why = "; ".join(reason for r in reports if r.applied.name == "shard-tensor-parallel" for reason in r.result.refusals)
        raise UnsupportedModel(f"--tensor-parallel-size {ranks}: {why or 'an attention could not be divided'}; use fewer ranks, or 1")
    inputs = []
    for spec in traced.inputs:
        if spec.name.startswith(("k_cache", "v_cache")):
            blocks, whole, *tile = spec.shape
            assert isinstance(whole, int)
            spec = msgspec.structs.replace(spec, shape=[blocks, whole // ranks, *tile])
        inputs.append(spec)
    return replace(traced, kv=msgspec.structs.replace(traced.kv, num_kv_heads=heads), inputs=tuple(inputs))


def rank_entries(entry: Entry, called: Sequence[Mapping[str, str]]) -> list[Entry]:
    """One program as the entries of its ranks, each with the tensors of its own."""
    entries = []
    for rank, names in enumerate(called):
        constants = {own: names[constant] for own, constant in entry.constants.items()}
        name = entry.name if rank == 0 else f"{entry.name}.rank{rank}"
        entries.append(msgspec.structs.replace(entry, name=name, constants=constants))
    return entries
