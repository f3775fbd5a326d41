"""One spelling for a captured graph.

torch.export gives a graph whose inputs are parameters, buffers and arguments in its own order, whose nodes carry stack
traces, and which holds checks and in-place writes. Here it becomes: the step's inputs as placeholders, constants as
get_attr nodes under their model names, one call per op, names numbered in order, no in-place write but attention's.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from llmc.errors import InternalError, UnsupportedModel

MUTATING = frozenset({"llmc.paged_attention.default"})  # writes its layer's K and V; nothing else may write

_CHECKS = frozenset({"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range_for_size.default"})
_FUNCTIONS = frozenset({operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv})


def canonical_graph(exported: Graph, inputs: Mapping[str, str], constants: Mapping[str, tuple[str, Tensor]]) -> GraphModule:
    """Rewrite an exported graph.

    Args:
        exported: torch.export's graph, one output tensor.
        inputs: exported placeholder -> our input name, in our order.
        constants: exported placeholder -> (dotted constant name, its tensor: fake, or real for buffers).

    Returns:
        A module that takes `inputs` in order and returns the output tensor. `meta` of each node holds "val" (on fake
        tensors) and, for calls, "module" (the path of the module it comes from), nothing else.

    Raises:
        UnsupportedModel: an op that llmc does not take into its graph, with the path of its module.
    """
    _replace_in_place(exported)
    placeholders = {node.name: node for node in exported.nodes if node.op == "placeholder"}
    root, graph = nn.Module(), Graph()
    new: dict[Node, Node] = {}
    for old_name, name in inputs.items():
        node = graph.placeholder(name)
        node.meta["val"] = placeholders[old_name].meta["val"]
        new[placeholders[old_name]] = node

    def copied(old: Node) -> Node:
        if old not in new:
            name, tensor = constants[old.name]
            set_tensor(root, name, tensor)
            new[old] = graph.get_attr(name)
            new[old].meta["val"] = old.meta["val"]
        return new[old]

    for old in exported.nodes:
        if old.op == "call_function" and str(old.target) not in _CHECKS:
            _check_allowed(old)
            args, kwargs = map_arg(old.args, copied), map_arg(old.kwargs, copied)  # constants first, so that they stand before
            name = old.target._opname if isinstance(old.target, OpOverload) else old.target.__name__
            node = graph.create_node("call_function", old.target, args, kwargs, name=name)
            node.meta["val"] = old.meta["val"]
            node.meta["module"] = module_path(old)
            new[old] = node
        elif old.op == "output":
            (result,) = old.args[0]
            graph.output(copied(result))
        elif old.op not in ("placeholder", "call_function"):
            raise InternalError(f"capture left a node of kind {old.op!r} ({old.name}); please report this model")
    module = GraphModule(root, graph, class_name="Step")
    module.graph.eliminate_dead_code(_is_impure)
    module.recompile()
    module.graph.lint()
    return module


def set_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor under a dotted name, making the modules on the way. Mutates `root`."""
    *path, last = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)


def module_path(node: Node) -> str:
    """Path of the module a node was captured from, "model.layers.0.self_attn"; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths: Sequence[str] = [entry[0] for entry in stack.values()]
    return paths[-1].removeprefix("model.") if paths else ""


def _is_impure(node: Node) -> bool:
    return node.op in ("placeholder", "output") or str(node.target) in MUTATING


def _check_allowed(node: Node) -> None:
    target = node.target
    if target in _FUNCTIONS:
        return
    if not isinstance(target, OpOverload):
        raise UnsupportedModel(f"{module_path(node)}: captured a call of {target!r}, which llmc's graph does not hold")
    if "scaled_dot_product" in str(target):
        raise UnsupportedModel(
            f"{module_path(node)}: attention goes past the attention interface ({target}), so it would not use the paged cache"
        )
    if target.namespace not in ("aten", "llmc"):
        raise UnsupportedModel(f"{module_path(node)}: op {target} is neither aten nor llmc")
    if target._schema.is_mutable and str(target) not in MUTATING:
        raise UnsupportedModel(f"{module_path(node)}: op {target} writes in place, in a way that llmc cannot turn into a pure op")
    if torch.Tag.nondeterministic_seeded in target.tags and not _is_inference_dropout(node):
        raise UnsupportedModel(f"{module_path(node)}: op {target} draws random numbers")


def _is_inference_dropout(node: Node) -> bool:
    return str(node.target) == "aten.dropout.default" and node.args[2] is False


def _replace_in_place(graph: Graph) -> None:
    """Turn x.op_(y) into x.op(y) where nobody else sees x's memory. Mutates `graph`; leaves the others for _check_allowed."""
    for node in graph.nodes:
        pure = _pure_overload(node)
        if pure is None or not _owns_memory(node.args[0], node):
            continue
        node.target = pure
        written = node.args[0]
        later = [user for user in written.users if user is not node and _stands_after(user, node)]
        for user in later:
            user.replace_input_with(written, node)


def _pure_overload(node: Node) -> OpOverload | None:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    base = target._opname
    if not base.endswith("_") or base.endswith("__"):
        return None
    packet: Any = getattr(torch.ops.aten, base[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _owns_memory(value: Any, write: Node) -> bool:
    """Whether `value` is the only name of its memory from `write` on: made by an op that returns new memory, or the only view of such."""
    if not isinstance(value, Node) or value.op != "call_function":
        return False
    maker = value.args[0] if value.target is operator.getitem else value
    if not isinstance(maker, Node) or not isinstance(maker.target, OpOverload):
        return False
    if _returns_alias(maker.target):
        base = maker.args[0]
        return isinstance(base, Node) and list(base.users) == [maker] and maker is value and _owns_memory(base, maker)
    before = [user for user in value.users if user is not write and not _stands_after(user, write)]
    return not any(isinstance(user.target, OpOverload) and _returns_alias(user.target) for user in before)


# Declared without alias information, yet they may return their input itself.
_MAYBE_ALIAS = frozenset({"reshape", "contiguous", "to", "dropout", "flatten", "type_as"})


def _returns_alias(target: OpOverload) -> bool:
    return any(result.alias_info is not None for result in target._schema.returns) or target._opname in _MAYBE_ALIAS


def _stands_after(node: Node, other: Node) -> bool:
    return bool(other < node)
