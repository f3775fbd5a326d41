"""What the report shows of a graph: one decoder layer before and after the passes, and the kernels with their bytes.

A layer is found without knowing the architecture. Every constant's name carries its layer's number, so each node has a layer: the
highest among the constants it depends on. The value that carries one layer's result into the next is the node of the layer that is
read latest in the next one (the residual sum: the next layer adds to it after its attention). A layer is what lies between two of
those values.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.cost import TOKENS, timeline

# Ops that move no data, or are part of how a value is named; drawn as lines.
_ELIDED = {"view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "expand", "getitem", "slice", "select", "alias", "detach",
           "split", "split_with_sizes", "chunk", "t", "contiguous", "clone", "unbind"}  # fmt: skip
_KINDS = {"linear": "matmul", "mm": "matmul", "bmm": "matmul", "matmul": "matmul", "addmm": "matmul", "attention": "attention",
          "attend": "attention", "mean": "reduction", "sum": "reduction", "softmax": "reduction", "rms_norm": "reduction",
          "layer_norm": "reduction", "topk": "reduction"}  # fmt: skip
_AXES = {"input_ids": "T", "logits_indices": "N", "seq_lens": "B"}


def layer_graph(gm: GraphModule, layer: int) -> dict[str, Any] | None:
    """One decoder layer as data for a drawing, in graph order.

    Returns:
        {"nodes": [{"op", "kind", "shape", "inputs": [node index or text]}], "elided": number of ops drawn as lines}, or None if the
        layer cannot be told from its neighbours.
    """
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    layers = _layers(gm.graph)
    first, last = _boundary(layers, order, layer - 1), _boundary(layers, order, layer)
    if first is None or last is None:
        return None
    inside = _descendants(first) & (_ancestors(last) | {last})
    members = [node for node in gm.graph.nodes if node in inside and node.op == "call_function"]
    if not members:
        return None
    shown = [node for node in members if _op(node) not in _ELIDED or node is last]
    number = {node: index for index, node in enumerate(shown)}
    symbols = _symbols(gm.graph)
    nodes = [
        {"op": _op(node), "kind": _kind(_op(node)), "shape": _shape(node, symbols), "inputs": _inputs(node, number, inside, first)}
        for node in shown
    ]
    return {"nodes": nodes, "elided": len(members) - len(shown)}


def kernels(gm: GraphModule) -> list[dict[str, Any]]:
    """The program's matrix products, embeddings and attentions, equal ones together, the largest first.

    Fields: op, rows (outputs N; of an embedding the table's rows), columns (inputs K), count per step, weight_bytes and padding_bytes of
    one, flop_per_token of one; of attention kv_bytes_per_token of one layer; per: "logits" where all calls compute only rows that want
    logits, else "token"; experts in the weight and choices of them per token, 1 and 1 of others. Bytes are predicted: each weight is read
    once per step.
    """
    wanted = G.placeholder(gm, "logits_indices")
    num_logits = None if wanted is None else G.size_expr(G.val(wanted).shape[0])
    found: Counter[tuple[Any, ...]] = Counter()
    pruned: Counter[tuple[Any, ...]] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "llmc":
            facts = _kernel(node)
            if facts is not None:
                found[facts] += 1
                first = next(i.meta["val"] for i in node.all_input_nodes if not G.is_constant(i))
                pruned[facts] += num_logits is not None and num_logits in map(G.size_expr, first.shape)
    names = ("op", "dtype", "rows", "columns", "weight_bytes", "padding_bytes", "flop_per_token", "kv_bytes_per_token",
             "experts", "choices")  # fmt: skip
    rows = [
        dict(zip(names, facts, strict=True)) | {"count": count, "per": "logits" if pruned[facts] == count else "token"}
        for facts, count in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"] * row["weight_bytes"], row["op"], row["rows"]))


def activations(gm: GraphModule) -> dict[str, Any]:
    """What a step keeps of its own values as it goes, predicted.

    Returns:
        {"tokens": of the step, each of another sequence, "bytes": alive behind each call that leaves a value, "peak_op": the call behind
        which most are}.
    """
    found = timeline(gm)
    peak = max(found, key=lambda one: one[1], default=None)
    return {"tokens": TOKENS, "bytes": [nbytes for _, nbytes in found], "peak_op": _op(peak[0]) if peak is not None else ""}


def _kernel(node: Node) -> tuple[Any, ...] | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    op = _op(node)
    if "k_cache" in arguments and "seq_lens" not in arguments:
        return None  # rope_kv_write: it touches the rows of its own tokens alone
    if "k_cache" in arguments and isinstance(arguments.get("k_cache"), Node):
        cache = arguments["k_cache"].meta["val"]
        each = 2 * int(cache.shape[1]) * int(cache.shape[3]) * cache.dtype.itemsize
        query = arguments["q"].meta["val"]
        return (op, _dtype(cache), int(query.shape[-2]), int(query.shape[-1]), 0, 0, 0, each, 1, 1)
    weight = arguments.get("weight")
    if not isinstance(weight, Node) or weight.meta["val"].dim() < 2:
        return None  # norms: a vector
    value = weight.meta["val"]
    scales = arguments.get("scales")
    stored = _nbytes(value) + (_nbytes(scales.meta["val"]) if isinstance(scales, Node) else 0)
    if "embedding_dim" in arguments:
        return (op, _dtype(value), int(value.shape[0]) * 16, int(arguments["embedding_dim"]), stored, 0, 0, 0, 1, 1)
    columns = int(arguments["x"].meta["val"].shape[-1])
    rows = int(arguments.get("out_features") or value.shape[-2])
    experts, choices = 1, 1
    if "expert_ids" in arguments:
        experts, choices = int(value.shape[0]), _multiple(arguments["expert_ids"].meta["val"].shape[0])
    padding, flop = _padding(value, experts * rows * columns, scales), 2 * rows * columns * choices
    return (op, _dtype(value), rows, columns, stored, padding, flop, 0, experts, choices)


def _multiple(size: Any) -> int:
    """The 8 of 8 T; 1 of a number."""
    expression = G.size_expr(size)
    return 1 if isinstance(expression, int) else int(expression.as_coeff_Mul()[0])


def _padding(value: torch.Tensor, elements: int, scales: Any) -> int:
    """Bytes of the stored weight that stand for no element of the matrix."""
    bits = 4 if scales is not None and value.dtype == torch.uint8 else 8 * value.dtype.itemsize
    return max(0, _nbytes(value) - elements * bits // 8)


def _nbytes(value: torch.Tensor) -> int:
    return prod(int(size) for size in value.shape) * value.dtype.itemsize


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _layer_of(name: str) -> int | None:
    """The first number among the parts of a dotted name: "model.layers.3.mlp.experts.5.w" is of layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _layers(graph: Graph) -> dict[Node, int]:
    """The highest layer among the constants a node depends on; -1: none."""
    found: dict[Node, int] = {}
    for node in graph.nodes:
        own = _layer_of(str(node.target)) if node.op == "get_attr" else None
        found[node] = max([-1 if own is None else own, *(found[i] for i in node.all_input_nodes)])
    return found


def _boundary(layers: dict[Node, int], order: dict[Node, int], layer: int) -> Node | None:
    """The value that carries `layer`'s result into the next layer."""
    best: tuple[int, Node] | None = None
    for node, own in layers.items():
        if own != layer or node.op != "call_function":
            continue
        read = [order[user] for user in node.users if layers[user] == layer + 1]
        if read and (best is None or max(read) >= best[0]):
            best = (max(read), node)
    return best[1] if best is not None else None


def _descendants(start: Node) -> set[Node]:
    found, queue = set(), [start]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def _ancestors(end: Node) -> set[Node]:
    found, queue = set(), [end]
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found


def _inputs(node: Node, number: dict[Node, int], inside: set[Node], first: Node) -> list[int | str]:
    """Producers as indices, through elided ops; constants and values from outside as text, each once."""
    found: list[int | str] = []

    def add(source: Node) -> None:
        if source in number:
            found.append(number[source])
        elif source is first:
            found.append("residual")
        elif G.is_constant(source):
            found.append(_last_words(str(source.target)))
        elif source in inside:
            for upstream in source.all_input_nodes:
                add(upstream)

    for source in node.all_input_nodes:
        add(source)
    return list(dict.fromkeys(found))


def _last_words(name: str) -> str:
    """ "model.layers.1.self_attn.q_proj.weight" -> "q_proj": what tells it from the layer's other weights."""
    parts = [part for part in name.split(".") if part not in ("weight", "packed_weight", "quantized_weight", "bias")]
    return parts[-1] if parts else name


def _op(node: Node) -> str:
    """ "aten.mul.Tensor" -> "mul"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1].lstrip("_")
    return getattr(node.target, "__name__", str(node.target))


def _kind(op: str) -> str:
    return next((kind for word, kind in _KINDS.items() if op == word or op.endswith("_" + word) or word in op.split("_")), "pointwise")


def _symbols(graph: Graph) -> dict[str, str]:
    """Names of symbolic sizes as docs/architecture.md has them."""
    found = {}
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) in _AXES and isinstance(node.meta.get("val"), torch.Tensor):
            found[str(node.meta["val"].shape[0])] = _AXES[str(node.target)]
    return found


def _shape(node: Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = [text for size in value.shape if (text := symbols.get(str(size), str(size))) != "1"]
    return " × ".join(sizes)
