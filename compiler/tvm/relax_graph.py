"""From a graph to a Relax module: what the passes left, said in the ops of Apache TVM.

    GraphModule -> IRModule with one function, `step`

`step` takes the graph's inputs, then its constants, in the order of first use. Sizes that are open in the graph are symbolic variables.
Every op is either said in Relax, for TVM to fuse and compile, or calls one of llmc's kernels as an extern packed function
(`extern_kernels.cpp`): matrix products and packed embeddings, whose bits for a row may not depend on its batch, and attention, which
writes the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from tvm import IRModule, relax, tirx

from llmc.compiler.tvm.ops import CONVERTERS, VIEWS, convert
from llmc.errors import InternalError, UnsupportedModel

ENTRY = "step"


@dataclass(frozen=True, kw_only=True)
class RelaxProgram:
    """constants: name in the weight table of each parameter behind the inputs, in order. extern_calls: op of ours -> number of calls."""

    module: IRModule
    constants: tuple[str, ...]
    extern_calls: Mapping[str, int]


@dataclass(kw_only=True)
class Conversion:
    """What the converter of a node works with.

    values: what each node above became: an expression, or a tuple of them.
    """

    builder: relax.BlockBuilder
    values: dict[Node, Any] = field(default_factory=dict)
    symbols: dict[str, tirx.Var] = field(default_factory=dict)
    extern_calls: dict[str, int] = field(default_factory=dict)

    def get(self, value: Any) -> Any:
        """An argument as the converter wants it: nodes replaced by what they became."""
        if isinstance(value, Node):
            return self.values[value]
        if isinstance(value, (list, tuple)):
            return [self.get(item) for item in value]
        return value

    def emit(self, expression: relax.Expr) -> relax.Var:
        return self.builder.emit(expression)

    def extern(self, name: str, arguments: Sequence[Any], outputs: Any) -> relax.Var:
        """Call llmc's kernel `name`; `outputs` is the fake tensor of its result."""
        self.extern_calls[name] = self.extern_calls.get(name, 0) + 1
        wrapped = [relax.prim_value(a) if isinstance(a, (int, float)) else a for a in arguments]
        return self.emit(relax.call_dps_packed(f"llmc_tvm_{name}", wrapped, self.tensor_type(outputs)))

    def shape(self, sizes: Sequence[Any]) -> list[Any]:
        """Sizes of a fake tensor: numbers, and expressions over the step's open sizes."""
        return [self.size(size) for size in sizes]

    def size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        return self._expression(size.node.expr)

    def tensor_type(self, value: torch.Tensor) -> Any:
        return relax.TensorType(self.shape(value.shape), dtype_name(value.dtype))

    def _expression(self, expr: Any) -> Any:
        if expr.is_Integer:
            return tirx.IntImm("int64", int(expr))
        if expr.is_Symbol:
            return self.symbols.setdefault(str(expr), tirx.Var(str(expr), "int64"))
        parts = [self._expression(part) for part in expr.args]
        if expr.is_Add or expr.is_Mul:
            total = parts[0]
            for part in parts[1:]:
                total = total + part if expr.is_Add else total * part
            return total
        raise InternalError(f"a size {expr} is neither a sum nor a product of open sizes; please report this model")


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", which TVM calls it too."""
    return str(dtype).removeprefix("torch.")


def refuse_unknown_ops(graph: GraphModule) -> None:
    """Look at every op before any is lowered.

    Raises:
        UnsupportedModel: names those that have no converter.
    """
    unknown = sorted({op_name(node) for node in graph.graph.nodes if node.op == "call_function"} - set(CONVERTERS))
    if unknown:
        raise UnsupportedModel(f"--backend tvm: no converter to TVM for {', '.join(unknown)}; compile with --backend inductor")


def op_name(node: Node) -> str:
    """As refusals name an op: "aten.mul.Tensor", "llmc.linear.default", "getitem"."""
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def to_relax(graph: GraphModule) -> RelaxProgram:
    """Convert a graph as the passes leave it; not changed.

    Raises:
        UnsupportedModel: an op, or a use of one, that has no converter.
    """
    refuse_unknown_ops(graph)
    builder = relax.BlockBuilder()
    made = Conversion(builder=builder)
    inputs, constants = _parameters(graph, made)
    with builder.function(ENTRY, [*inputs, *constants.values()]):
        with builder.dataflow():
            result: Any = None
            for node in graph.graph.nodes:
                if node.op == "get_attr":
                    made.values[node] = constants[str(node.target)]
                elif node.op == "call_function":
                    made.values[node] = convert(made, node, op_name(node))
                elif node.op == "output":
                    result = builder.emit_output(made.get(_result(node)))
        builder.emit_func_output(result)
    return RelaxProgram(module=builder.finalize(), constants=tuple(constants), extern_calls=dict(sorted(made.extern_calls.items())))


def _result(output: Node) -> Node:
    """The value whose elements are the step's result: what only changes its shape behind it would be a copy. Its last dimension stays."""
    (found,) = output.args
    node = found[0] if isinstance(found, (list, tuple)) else found
    assert isinstance(node, Node)
    while op_name(node) in VIEWS and isinstance(node.args[0], Node):
        before = node.args[0]
        if before.meta["val"].numel() != node.meta["val"].numel() or before.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
            break
        node = before
    return node


def _parameters(graph: GraphModule, made: Conversion) -> tuple[list[relax.Var], dict[str, relax.Var]]:
    inputs: list[relax.Var] = []
    constants: dict[str, relax.Var] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            made.values[node] = relax.Var(node.name, made.tensor_type(node.meta["val"]))
            inputs.append(made.values[node])
        elif node.op == "get_attr" and str(node.target) not in constants:
            constants[str(node.target)] = relax.Var(f"constant_{len(constants)}", made.tensor_type(node.meta["val"]))
    return inputs, constants
