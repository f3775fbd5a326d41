"""Add the low-rank term of each row's adapter behind the linears that adapters may change.

Before:   y = linear(x, w, bias)
After:    y = lora_add(linear(x, w, bias), x, lora_slots, lora_pool, rank, [N], [offset]), which all readers of the linear read
Applies:  the linear's weight is a constant of a module in the layout, and its rows are the step's tokens
Why:      several fine-tunes share one set of weights, one program and one batch; a row of slot -1 keeps the bits it had
Order:    after no-op-elimination; before the merges, which merge the terms with their linears, and before prune-to-needed-rows, which
          selects the slots of the needed rows as well. At -O0 it is the only pass. Two inputs are added behind the others: `lora_slots`
          int32 [T], the adapter of each token or -1, and `lora_pool` [max_loras, slot_elements], the adapters (docs/lora.md)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject

aten = torch.ops.aten

SLOTS, POOL = "lora_slots", "lora_pool"
_ALIGNMENT = 32  # elements: each module's matrices begin on a cache line
_IN_A_LAYER = re.compile(r"\.[0-9]+\.")  # the output projection stands in none, and is no target


@dataclass(frozen=True, kw_only=True)
class AdaptedLinear:
    """One linear that adapters may change. Its A [rank, in_features] lies at `offset` of an adapter's elements, B [rank, out_features],
    the adapter's B transposed and scaled, right behind it."""

    name: str  # of the module, "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class LoraLayout:
    """Where the matrices of one adapter stand among its `slot_elements`."""

    rank: int  # of every adapter; a smaller one is filled up with zeros
    modules: tuple[AdaptedLinear, ...]
    slot_elements: int


def adaptable(gm: GraphModule) -> dict[str, tuple[int, int]]:
    """Module -> (in_features, out_features) of the linears inside layers that every token goes through, in order of use."""
    found: dict[str, tuple[int, int]] = {}
    num_tokens: Any = None
    for node in gm.graph.nodes:
        module = _module(node)
        if module is None or not _IN_A_LAYER.search(f".{module}."):
            continue
        num_tokens = _num_rows(node) if num_tokens is None else num_tokens  # of the first layer's first
        if _refused(node, num_tokens) is None:
            out_features, in_features = G.val(G.args_of(node)[1]).shape
            found[module] = (int(in_features), int(out_features))
    return found


def lora_layout(modules: dict[str, tuple[int, int]], rank: int) -> LoraLayout:
    """Lay out the matrices of `modules`, as `adaptable` gives them, for adapters of a rank up to `rank`."""
    placed, end = [], 0
    for name, (in_features, out_features) in modules.items():
        placed.append(AdaptedLinear(name=name, in_features=in_features, out_features=out_features, offset=end))
        end += -(-rank * (in_features + out_features) // _ALIGNMENT) * _ALIGNMENT
    return LoraLayout(rank=rank, modules=tuple(placed), slot_elements=end)


def with_targets(modules: dict[str, tuple[int, int]], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Those of `modules` that one of `targets` names, by full name or by the end of it, as PEFT does."""
    return {name: shape for name, shape in modules.items() if any(name == t or name.endswith(f".{t}") for t in targets)}


@dataclass(frozen=True)
class AddLora(Pass):
    """See above. `dtype`: of the pool."""

    name: ClassVar[str] = "add-lora"
    numerics: ClassVar[Numerics] = Numerics.EXACT  # of rows without an adapter
    changes_inputs: ClassVar[bool] = True
    layout: LoraLayout
    max_loras: int
    dtype: torch.dtype

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        wanted = {module.name: module for module in self.layout.modules}
        matches = 0
        refusals: Counter[str] = Counter()
        inputs: tuple[Node, Node] | None = None
        for node in list(gm.graph.nodes):
            module = wanted.get(_module(node) or "")
            if module is None:
                continue
            if inputs is None:
                inputs = self._inputs(gm, _num_rows(node))
            reject = _refused(node, G.val(inputs[0]).shape[0])
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            slots, pool = inputs
            with gm.graph.inserting_after(node):
                arguments = (node, G.args_of(node)[0], slots, pool, self.layout.rank, [module.out_features], [module.offset])
                added = G.call(gm, overload("lora_add"), arguments)
            node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
            matches += 1
        return PassResult(changed=inputs is not None, matches=matches, refusals=refusals)

    def ensures(self, gm: GraphModule) -> str | None:
        added = {_module(G.args_of(node)[0]) for node in gm.graph.nodes if G.is_op(node, G.LORA_ADD)}
        missing = [module.name for module in self.layout.modules if module.name not in added]
        return f"{missing[0]} got no term for its adapters" if missing else None

    def _inputs(self, gm: GraphModule, num_tokens: Any) -> tuple[Node, Node]:
        """The two new inputs, behind the last."""
        mode = G.fake_mode(gm)
        last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
        with gm.graph.inserting_after(last):
            slots = gm.graph.placeholder(SLOTS)
        with gm.graph.inserting_after(slots):
            pool = gm.graph.placeholder(POOL)
        with mode:
            slots.meta["val"] = torch.empty((num_tokens,), dtype=torch.int32, device="cpu")
            pool.meta["val"] = torch.empty((self.max_loras, self.layout.slot_elements), dtype=self.dtype, device="cpu")
        return slots, pool


def _module(node: Any) -> str | None:
    """The module whose weight a linear multiplies with; None for everything else."""
    if not G.is_op(node, aten.linear.default):
        return None
    weight = G.args_of(node)[1]
    if not G.is_constant(weight) or len(G.val(weight).shape) != 2:
        return None
    module, _, parameter = str(weight.target).rpartition(".")
    return module if parameter == "weight" else None


def _refused(linear: Node, num_tokens: Any) -> Reject | None:
    """Why a linear's rows are not those that the slots of `num_tokens` tokens speak of."""
    if not G.same_size(_num_rows(linear), num_tokens):
        return Reject("its rows are not the step's tokens", (linear.name, tuple(G.val(linear).shape)))
    return None


def _num_rows(linear: Node) -> Any:
    rows: Any = 1
    for size in G.val(linear).shape[:-1]:
        rows = rows * size
    return rows
