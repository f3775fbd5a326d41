"""Reading and changing an FX graph with its metadata kept right. Every pass works through these few functions.

Invariant: every node that yields a value has it, on fake tensors, in `node.meta["val"]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import _config as fx_config
from torch.fx.node import map_arg

from llmc.passes.weights import WeightTable

ATTENTION = "llmc.paged_attention.default"  # by name: matching it needs no kernel to be loaded
ROPE_KV_WRITE = "llmc.rope_kv_write.default"
LORA_ADD = "llmc.lora_add.default"
CACHE_WRITERS = (ATTENTION, ROPE_KV_WRITE)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that every kernel of llmc takes


def is_op(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`: op overloads, functions, or names such as "llmc.linear.default"."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return any(str(node.target) == t if isinstance(t, str) else node.target is t for t in targets)


def is_constant(value: Any) -> bool:
    """Whether `value` is a node that reads a constant of the weight table."""
    return isinstance(value, Node) and value.op == "get_attr"


def val(node: Any) -> Any:
    """The fake value of a node; a plain argument is its own value."""
    return node.meta["val"] if isinstance(node, Node) else node


def args_of(node: Any) -> tuple[Any, ...]:
    """A call's positional arguments. Untyped: which op it is says what they are."""
    arguments: tuple[Any, ...] = node.args
    return arguments


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def placeholder(gm: GraphModule, name: str) -> Node | None:
    """The graph input called `name`, or None."""
    return next((n for n in gm.graph.nodes if n.op == "placeholder" and n.target == name), None)


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode the graph's values live in, with its symbolic sizes."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            mode: FakeTensorMode = node.meta["val"].fake_mode
            return mode
    raise AssertionError("a graph without fake tensors")


@contextlib.contextmanager
def _fake(mode: FakeTensorMode) -> Iterator[None]:
    # backed_size_oblivious, as at capture: sizes 0 and 1 share the general graph
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    # torch 2.11's composite ops (linear, matmul) know symbolic sizes in their Python form alone
    with oblivious, mode, enable_python_dispatcher(), torch.no_grad():
        yield


def compute_val(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a call yields, on fake tensors. Raises what the op raises on arguments it does not take."""
    with _fake(mode):
        return target(*map_arg(args, lambda n: n.meta["val"]), **map_arg(kwargs, lambda n: n.meta["val"]))


def call(gm: GraphModule, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """Add a call at the graph's insertion point, with its value."""
    node = gm.graph.call_function(target, args, kwargs or {})
    node.meta["val"] = compute_val(fake_mode(gm), target, node.args, node.kwargs)
    return node


def constant(gm: GraphModule, weights: WeightTable, name: str) -> Node:
    """Add a read of constant `name` of `weights` at the insertion point; makes the module's fake attribute if need be."""
    known = next((n.meta["val"] for n in gm.graph.nodes if n.op == "get_attr" and n.target == name), None)
    if known is None:
        with fake_mode(gm):
            known = torch.empty(weights[name].shape, dtype=weights[name].dtype, device="cpu")
        set_attribute(gm, name, known)
    node = gm.graph.get_attr(name)
    node.meta["val"] = known
    return node


def set_attribute(gm: GraphModule, name: str, value: torch.Tensor) -> None:
    """Put a tensor on the module as a buffer under a dotted name, making the modules on the way."""
    *path, last = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        child = getattr(owner, part, None)
        if not isinstance(child, torch.nn.Module):
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    owner.register_buffer(last, value)


def delete_attribute(gm: GraphModule, name: str) -> None:
    """Take a tensor off the module again."""
    path, _, last = name.rpartition(".")
    delattr(gm.get_submodule(path), last)


def read_constants(gm: GraphModule) -> list[str]:
    """Names of the constants the graph reads, in order of first use."""
    return list(dict.fromkeys(n.target for n in gm.graph.nodes if n.op == "get_attr"))


def outputs(gm: GraphModule) -> list[Node]:
    """The graph's outputs, whether it returns one value or a tuple."""
    (returned,) = args_of(gm.graph.output_node())
    return [returned] if isinstance(returned, Node) else [r for r in returned if isinstance(r, Node)]


def substitute(gm: GraphModule, old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, erase `old`, and correct the readers' values where strides differ."""
    users = set(old.users)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    if signature(val(old)) != signature(val(new)):
        repropagate(gm, users)


def erase_dead(gm: GraphModule) -> None:
    """Erase what nothing reads: unused calls and unused reads of constants."""
    gm.graph.eliminate_dead_code()


def writes_to(user: Node, value: Node) -> bool:
    """Whether the op `user` writes to its argument `value`, going by its schema."""
    if not isinstance(user.target, OpOverload) or not user.target._schema.is_mutable:
        return False
    arguments = enumerate(user.target._schema.arguments)
    return any(a.alias_info is not None and a.alias_info.is_write and argument(user, i, a.name) is value for i, a in arguments)


def size_expr(size: Any) -> Any:
    """A dimension in a form that compares by value: an int, or the symbolic expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_size(a: Any, b: Any) -> bool:
    """Whether two dimensions are the same number for every binding of the symbols."""
    return bool(size_expr(a) == size_expr(b))


def even_rows(value: torch.Tensor) -> bool:
    """Whether the leading dimensions of a tensor collapse into one: rows are contiguous and lie evenly, with or without gaps."""
    sizes, strides = [size_expr(s) for s in value.shape], [size_expr(s) for s in value.stride()]
    if strides[-1] != 1:
        return False
    outer = [(size, stride) for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size != 1]
    return all(above == size * stride for (_, above), (size, stride) in pairwise(outer))


def signature(value: Any) -> Any:
    """What must agree for two fake values to be the same metadata."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, tuple(map(size_expr, value.shape)), tuple(map(size_expr, value.stride())))
    if isinstance(value, (list, tuple)):
        return tuple(signature(v) for v in value)
    return size_expr(value)


def repropagate(gm: GraphModule, changed: Iterable[Node]) -> None:
    """Compute again the values of `changed` nodes and of everything downstream whose inputs' shapes or strides moved."""
    mode, pending = fake_mode(gm), set(changed)
    if not pending:
        return
    for node in gm.graph.nodes:
        if node not in pending or node.op != "call_function":
            continue
        fresh = compute_val(mode, node.target, node.args, node.kwargs)
        if "val" not in node.meta or signature(fresh) != signature(node.meta["val"]):
            pending.update(node.users)
        node.meta["val"] = fresh


def insert_after(graph: Graph, node: Node) -> Any:
    """Context: the insertion point right after `node`, past the inputs if it is one of them."""
    if node.op == "placeholder":
        while node.next.op == "placeholder":
            node = node.next
    return graph.inserting_after(node)
