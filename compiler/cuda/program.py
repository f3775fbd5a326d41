"""A model's program for a GPU: one plan per size, made of layers that are compiled once each.

GraphModule with symbolic sizes, [PlanSize, ...]  ->  CudaProgram
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from llmc.artifacts.manifest import TensorSpec
from llmc.compiler.cuda.cross import cross_cuda
from llmc.compiler.cuda.layers import Part, cut
from llmc.compiler.cuda.own_kernels import KernelCache
from llmc.compiler.cuda.planner import PlannedProgram, Stamp, stamp_plan
from llmc.compiler.cuda.schedule import Schedule, check_calls, direct_schedule, schedule
from llmc.compiler.cuda.sizes import PlanSize
from llmc.compiler.cuda.specialise import specialise
from llmc.compiler.pipeline import size_pipeline
from llmc.errors import InternalError, UnsupportedModel
from llmc.kernels.cuda_targets import CudaTarget
from llmc.kernels.ops import overload
from llmc.kernels.registry import OPS
from llmc.passes import PassContext, WeightTable
from llmc.passes import graph as G

# What a call in a schedule may be: an op of ours that has kernels for a GPU. Everything else would be a library call.
_CALLS = frozenset(f"llmc.{name}.default" for name in OPS)
# Products that a pass should have taken: Inductor has kernels for them, but not such whose rows have the same bits at every size.
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum", "dot", "mv", "_grouped_mm", "convolution",
                 "scaled_dot_product_attention")
)  # fmt: skip
_EXAMPLE_BLOCKS = 64  # of a cache; plans leave it open, and nothing compiled depends on it
LOGITS, NEXT_TOKENS = "logits", "next_tokens"


@dataclass(frozen=True, kw_only=True)
class CudaProgram:
    """Plans by size, in the order given, and how they came about.

    layers: parts stamped into all plans together. distinct: of them compiled. inductor: of these by Inductor, the rest being ops of ours.
    size_passes: rewrites at the first size by each pass that runs on fixed sizes. tiles: where those of the matrix
    products come from (`kernels.tuned`).
    """

    plans: Mapping[PlanSize, PlannedProgram]
    layers: int
    distinct: int
    inductor: int
    size_passes: Mapping[str, int]
    tiles: Mapping[str, Any]


@dataclass
class _Layers:
    """The schedules made so far, by the key of their part."""

    target: CudaTarget
    known: dict[str, Schedule] = field(default_factory=dict)
    used: int = 0
    inductor: int = 0

    def schedule(self, part: Part) -> Schedule:
        self.used += 1
        if part.key not in self.known:
            made = direct_schedule(part.graph)
            if made is None:
                made = schedule(part.graph, self.target, allowed_calls=_CALLS)
                self.inductor += 1
            check_calls(made.calls, _CALLS)
            self.known[part.key] = made
        return self.known[part.key]


def with_next_tokens(graph: GraphModule) -> None:
    """Let a graph return the token of each row's largest logit besides the logits. Changes it."""
    (logits,) = G.outputs(graph)
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        tokens = G.call(graph, overload("argmax"), (logits,))
    output.args = ((logits, tokens),)
    graph.recompile()


def output_specs(logits: TensorSpec) -> list[TensorSpec]:
    """What every plan gives: the captured graph's output, and the largest logit's token of each row."""
    return [logits, TensorSpec(name=NEXT_TOKENS, dtype="int64", shape=logits.shape[:1])]


def compile_program(
    graph: GraphModule,
    inputs: Sequence[TensorSpec],
    sizes: Sequence[PlanSize],
    target: CudaTarget,
    *,
    table_blocks: int,
    progress: Callable[[PlanSize], None] | None = None,
) -> CudaProgram:
    """Make a plan per size.

    Args:
        graph: as the passes and `with_next_tokens` leave it; not changed.
        inputs: of the graph, in order.
        table_blocks: columns of the block tables; attention's order of summation depends on it, so it is one number for all.
        progress: told of each size before it is compiled.

    Raises:
        UnsupportedModel: an op would be a library call, or no kernel takes its arguments.
        InternalError: Inductor failed, a check of a schedule or plan failed, or a constant is missing in a plan.
    """
    check_products(graph)
    wanted = set(G.read_constants(graph))
    layers, own = _Layers(target), KernelCache(target)
    plans: dict[PlanSize, PlannedProgram] = {}
    rewrites: dict[str, int] = {}
    with cross_cuda(target):
        for size in sizes:
            if progress is not None:
                progress(size)
            dims = {"T": size.num_tokens, "B": size.num_seqs, "N": size.num_logits, "M": table_blocks}
            fixed = specialise(graph, inputs, {**dims, "NB": _EXAMPLE_BLOCKS})
            matches = run_size_passes(fixed)
            rewrites = rewrites or matches
            plans[size] = _plan(fixed, inputs, dims, layers, own, decode=size.decode)
            check_weights(plans[size], wanted, str(size))
    return CudaProgram(
        plans=plans,
        layers=layers.used,
        distinct=len(layers.known),
        inductor=layers.inductor,
        size_passes=rewrites,
        tiles=own.tuned.facts(),
    )


def run_size_passes(graph: GraphModule) -> dict[str, int]:
    """Run the passes that need numbers for sizes over a graph of `specialise`. Changes it; returns rewrites by pass.

    They add no constant, so they need none of the weight table.
    """
    context = PassContext(weights=WeightTable(), max_positions=0)
    return {applied.name: applied.run(graph, context).matches for applied in size_pipeline()}


def _plan(
    graph: GraphModule, inputs: Sequence[TensorSpec], dims: Mapping[str, int], layers: _Layers, own: KernelCache, *, decode: bool
) -> PlannedProgram:
    placeholders = graph.graph.find_nodes(op="placeholder")
    named: dict[Hashable, Hashable] = {node: spec.name for node, spec in zip(placeholders, inputs, strict=True)}
    stamps = []
    for part in cut(graph):
        made = layers.schedule(part)
        stamps.append(
            Stamp(
                schedule=made,
                inputs=[named.get(node, node) for node in part.inputs],
                outputs=part.outputs,
                constants={own_name: part.constants[int(name[1:])] for own_name, name in made.constants.items()},
            )
        )
    given = {spec.name: node.meta["val"] for node, spec in zip(placeholders, inputs, strict=True)}
    results = dict(zip((LOGITS, NEXT_TOKENS), G.outputs(graph), strict=True))
    return stamp_plan(stamps, given, results, dims, own, decode=decode)


def check_products(graph: GraphModule) -> None:
    """Check that no matrix product or attention is left but ours.

    Raises:
        UnsupportedModel: names the op.
    """
    for node in graph.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.overloadpacket in _PRODUCTS:
            raise UnsupportedModel(
                f"compiled for CUDA, the model would call {node.target} ({node.name}), for which llmc has no kernel in this place; "
                "compile for a CPU with --target cpu"
            )


def check_weights(program: PlannedProgram, wanted: set[str], where: str) -> None:
    """Check that a plan reads every constant of the graph, and no other.

    Raises:
        InternalError: names the first that differs. Constants of one shape merged into one give wrong answers without any other sign.
    """
    held = {region.name for region in program.plan.regions if region.kind == "weight"}
    if held != wanted:
        raise InternalError(
            f"the plan for {where} reads {len(held)} constants, the graph {len(wanted)} "
            f"(first difference: {sorted(held ^ wanted)[0]}); please report this"
        )
