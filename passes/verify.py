"""What every graph must satisfy after every pass. Checked against a snapshot taken before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from llmc.passes import graph as G
from llmc.passes.weights import WeightTable


@dataclass(frozen=True)
class Snapshot:
    """The facts about a graph that a pass may not make worse, and what each node was, to find the ones it touched."""

    aliases: frozenset[tuple[int, str]]
    local_mutations: int
    inputs: tuple[Any, ...]
    nodes: dict[Node, tuple[Any, ...]]


def snapshot(gm: GraphModule) -> Snapshot:
    """Read the facts of `gm` that `violation` compares with."""
    return Snapshot(
        aliases=_aliases(gm),
        local_mutations=sum(base.op == "call_function" for _, base in _mutations(gm)),
        inputs=_inputs(gm),
        nodes={node: _identity(node) for node in gm.graph.nodes},
    )


def violation(gm: GraphModule, weights: WeightTable, before: Snapshot, *, inputs_may_change: bool = False) -> str | None:
    """The first rule `gm` breaks, as one sentence; None if it is valid. `inputs_may_change`: in shape, the pass says so."""
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        return f"the graph is malformed: {error}"
    return (
        (None if inputs_may_change else _inputs_changed(gm, before))
        or _missing_values(gm)
        or _unknown_constants(gm, weights)
        or _dead_code(gm)
        or _new_aliases(gm, before)
        or _forbidden_mutations(gm, before)
        or _wrong_values(gm, before)
    )


def _inputs(gm: GraphModule) -> tuple[Any, ...]:
    return tuple((n.target, G.signature(n.meta.get("val"))) for n in gm.graph.nodes if n.op == "placeholder")


def _identity(node: Node) -> tuple[Any, ...]:
    inputs: list[int] = []
    map_arg((node.args, node.kwargs), lambda n: inputs.append(id(n.meta.get("val"))))
    return (node.target, node.args, tuple(sorted(node.kwargs.items())), tuple(inputs), id(node.meta.get("val")))


def _inputs_changed(gm: GraphModule, before: Snapshot) -> str | None:
    if _inputs(gm) == before.inputs:
        return None
    return "the graph's inputs changed: their names, order, shapes and dtypes are the contract with the runtime"


def _yields_nothing(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def _missing_values(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if node.op != "output" and not _yields_nothing(node) and node.meta.get("val") is None:
            return f"node {node.name} ({node.target}) has no meta['val']"
    return None


def _unknown_constants(gm: GraphModule, weights: WeightTable) -> str | None:
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        if node.target not in weights:
            return f"the graph reads constant {node.target}, which is not in the weight table"
        entry, value = weights[node.target], node.meta["val"]
        in_table, in_graph = (entry.dtype, entry.shape), (value.dtype, tuple(value.shape))
        if in_table != in_graph:
            return f"constant {node.target} is {in_table} in the weight table and {in_graph} in the graph"
    return None


def _dead_code(gm: GraphModule) -> str | None:
    for node in gm.graph.nodes:
        if not node.users and node.op not in ("placeholder", "output") and not node.is_impure():
            return f"dead code: nothing reads {node.name} ({node.target})"
    return None


def _viewed(node: Node) -> Node | None:
    """The node whose memory a call's result may share, going by the op's schema."""
    if not isinstance(node.target, OpOverload):
        listed = node.args[0] if node.op == "call_function" and node.args else None
        return listed if isinstance(listed, Node) else None  # getitem
    schema = node.target._schema
    shared = {name for r in schema.returns if r.alias_info is not None for name in r.alias_info.before_set}
    for position, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and shared & set(arg.alias_info.before_set):
            value = G.argument(node, position, arg.name)
            first = value[0] if isinstance(value, (list, tuple)) else value
            return first if isinstance(first, Node) else None
    return None


def _base(node: Node) -> Node:
    """The node that owns the memory `node` may be a view of."""
    while node.op == "call_function" and (viewed := _viewed(node)) is not None:
        node = viewed
    return node


def _aliases(gm: GraphModule) -> frozenset[tuple[int, str]]:
    bases = [(i, _base(out)) for i, out in enumerate(G.outputs(gm))]
    return frozenset((i, str(base.target)) for i, base in bases if base.op in ("placeholder", "get_attr"))


def _new_aliases(gm: GraphModule, before: Snapshot) -> str | None:
    for index, name in sorted(_aliases(gm) - before.aliases):
        return f"output {index} newly shares memory with {name}"
    return None


def _mutations(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """(call, node whose memory it writes), for every write in the graph."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        for position, arg in enumerate(node.target._schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                written = G.argument(node, position, arg.name)
                if isinstance(written, Node):
                    yield node, _base(written)


def _forbidden_mutations(gm: GraphModule, before: Snapshot) -> str | None:
    local = 0
    for node, base in _mutations(gm):
        if base.op == "call_function":
            local += 1
        elif not G.is_op(node, *G.CACHE_WRITERS) or base.op != "placeholder":
            return f"{node.target} writes to {base.target}; only {' and '.join(G.CACHE_WRITERS)} may write, and only to caches"
    if local > before.local_mutations:
        return f"the graph writes to its own values {local} times, {before.local_mutations} times before the pass; passes add no mutation"
    return None


def _wrong_values(gm: GraphModule, before: Snapshot) -> str | None:
    """Compute the fake value of every node the pass touched again and compare.

    What a call yields follows from the op and its arguments' metadata, so calls of equal layers are computed once.
    """
    touched = [n for n in gm.graph.nodes if n.op == "call_function" and before.nodes.get(n) != _identity(n)]
    mode = G.fake_mode(gm) if touched else None
    computed: dict[Any, Any] = {}
    for node in touched:
        assert mode is not None
        key = (node.target, _described(node.args), _described(node.kwargs))
        if key not in computed:
            try:
                computed[key] = G.signature(G.compute_val(mode, node.target, node.args, node.kwargs))
            except Exception as error:
                return f"node {node.name} ({node.target}) does not take its arguments: {error}"
        yields, says = computed[key], G.signature(node.meta.get("val"))
        if yields != says:
            return f"node {node.name} ({node.target}) yields {yields}, but its meta['val'] says {says}"
    return None


def _described(argument: Any) -> Any:
    """All of an argument that a call's shape rule may look at, by value. 1, 1.0 and True differ."""
    if isinstance(argument, Node):
        return Node, G.signature(argument.meta.get("val"))
    if isinstance(argument, tuple | list):
        return type(argument).__name__, tuple(_described(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _described(item)) for name, item in argument.items())
    if isinstance(argument, slice):  # which cannot be hashed
        return slice, _described((argument.start, argument.stop, argument.step))
    return type(argument), argument
