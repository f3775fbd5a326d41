"""A graph as stable text, for dumps and goldens.

Calls are numbered per op in graph order, symbols in order of first appearance, so the text does not depend on how a graph came
to be, nor on the version of torch that named its symbols. Constants print as @name, with their recipes at the end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.weights import WeightTable

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.float8_e4m3fn: "f8e4m3", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_SYMBOL = re.compile(r"\b[suz]+\d+\b")


class _Printer:
    def __init__(self, gm: GraphModule, weights: WeightTable | None) -> None:
        self.gm, self.weights = gm, weights
        self.symbols: dict[str, str] = {}
        self.names: dict[Node, str] = {}
        self.counts: Counter[str] = Counter()

    def size(self, size: Any) -> str:
        text = str(G.size_expr(size)).replace(" ", "")
        return _SYMBOL.sub(lambda m: self.symbols.setdefault(m.group(), f"s{len(self.symbols)}"), text)

    def type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(self.size, value.shape))}]"
        if isinstance(value, (list, tuple)):
            return "(" + ", ".join(map(self.type, value)) + ")"
        return self.size(value)

    def argument(self, value: Any) -> str:
        if isinstance(value, Node):
            return f"@{value.target}" if G.is_constant(value) else self.names[value]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(self.argument, value)) + "]"
        if isinstance(value, str):
            return repr(value)
        return str(value).removeprefix("torch.")

    def line(self, node: Node) -> str | None:
        if node.op == "get_attr":
            return None
        if node.op == "output":
            return "return " + ", ".join(self.argument(a) for a in G.outputs(self.gm))
        if node.op == "placeholder":
            self.names[node] = str(node.target)
            return f"input {node.target}: {self.type(node.meta['val'])}"
        op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", str(node.target))
        op = op.removeprefix("aten.").removesuffix(".default")
        base = op.split(".")[0] if not op.startswith("llmc.") else op.removeprefix("llmc.")
        number = self.counts[base]
        self.counts[base] += 1
        self.names[node] = f"%{base}_{number}"
        arguments = [self.argument(a) for a in node.args] + [f"{k}={self.argument(v)}" for k, v in sorted(node.kwargs.items())]
        text = f"{op}({', '.join(arguments)})"
        value = node.meta.get("val")
        return text if value is None else f"{self.names[node]}: {self.type(value)} = {text}"

    def constants(self) -> list[str]:
        lines = []
        for name in sorted(G.read_constants(self.gm)):
            node = next(n for n in self.gm.graph.nodes if n.op == "get_attr" and n.target == name)
            recipe = ""
            if self.weights is not None and name in self.weights:
                recipe = " = " + _recipe_text(self.weights[name].recipe)
            lines.append(f"constant @{name}: {self.type(node.meta['val'])}{recipe}")
        return lines


def _recipe_text(recipe: dict[str, Any]) -> str:
    """A recipe on one line; a literal's bytes are left out."""
    op = recipe["op"]
    if op == "source":
        return str(recipe["name"])
    if op == "computed":
        return f"computed({recipe['key']})"
    if op == "literal":
        return "literal"
    inputs = recipe.get("inputs", [recipe["input"]] if "input" in recipe else [])
    rest = {k: v for k, v in sorted(recipe.items()) if k not in ("op", "input", "inputs")}
    return f"{op}({', '.join([_recipe_text(r) for r in inputs] + [f'{k}={json.dumps(v)}' for k, v in rest.items()])})"


def graph_text(gm: GraphModule, weights: WeightTable | None = None) -> str:
    """The graph, one line per input, call and output, then one per constant."""
    printer = _Printer(gm, weights)
    lines = [line for node in gm.graph.nodes if (line := printer.line(node)) is not None]
    return "\n".join(lines + printer.constants()) + "\n"
