"""Small graphs for testing passes, and the four assertions every pass is tested with.

A `Case` is a captured module together with the tensors its weight table's recipes name. Graphs run on an interpreter that applies
the recipes, so a wrong recipe shows as a wrong answer. An op's bits depend there on the values it is given alone: torch's own kernels
take other paths for other strides and for the last few elements, which would hide whether a *pass* changed the mathematics. Linears sum
in the order of K for every row and column, as `llmc.linear` promises; pointwise ops and reductions compute in fp64 and round once.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental import _config as fx_config

from llmc.compiler.canonical import canonical_graph
from llmc.passes import TOLERANCES, Constant, Numerics, Pass, PassContext, PassReport, WeightTable, graph_text, run_passes

GOLDEN = Path(__file__).parent / "golden"
MAX_POSITIONS = 64

aten = torch.ops.aten


@dataclass
class Case:
    """A graph, what its constants are made of, and arguments to call it with."""

    gm: GraphModule
    ctx: PassContext
    sources: dict[str, Tensor]
    args: tuple[Tensor, ...]

    def apply(self, *passes: Pass) -> tuple[Case, list[PassReport]]:
        """A copy with passes applied; this one stays as it is."""
        gm = copy_graph(self.gm)
        ctx = PassContext(weights=copy.copy(self.ctx.weights), max_positions=self.ctx.max_positions)
        ctx.weights.constants, ctx.weights.computed = dict(ctx.weights.constants), dict(ctx.weights.computed)
        reports = run_passes(gm, passes, ctx)
        return Case(gm, ctx, self.sources, self.args), reports

    def text(self) -> str:
        return graph_text(self.gm, self.ctx.weights)

    def run(self, *args: Tensor, torch_ops: bool = False) -> list[Tensor]:
        """The graph's outputs, then its arguments as it left them (caches are written). torch_ops: by torch's own kernels."""
        real = [a.clone() for a in args or self.args]
        with torch.no_grad():
            out = _Executor(self, torch_ops).run(*real)
        return [*(out if isinstance(out, (list, tuple)) else (out,)), *real]


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph of its own over the same fake values."""
    graph = torch.fx.Graph()
    mapping: dict[Any, Any] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    copied = GraphModule(gm, graph)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copied


# Left to torch, since rotary tables are made by these very ops.
_TORCH_ITSELF = {aten.cos.default, aten.sin.default}
_REDUCTIONS = {aten.mean.dim, aten.sum.default, aten.sum.dim_IntList, aten.layer_norm.default, aten.softmax.int, aten.cumsum.default}


class _Executor(Interpreter):
    def __init__(self, case: Case, torch_ops: bool) -> None:
        super().__init__(case.gm)
        self.case, self.torch_ops = case, torch_ops

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        entry = self.case.ctx.weights[target]
        value = evaluate(entry.recipe, self.case.sources, self.case.ctx.weights.computed)
        assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.torch_ops:
            return super().call_function(target, args, kwargs)
        if target is aten.linear.default:
            return strict_linear(*args, **kwargs)
        if target is aten.addmm.default:
            return strict_linear(args[1], args[2].t(), args[0])
        if target in _REDUCTIONS or (isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags and target not in _TORCH_ITSELF):
            return _rounded_once(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _rounded_once(target: OpOverload, args: Any, kwargs: Any) -> Any:
    dtype = target(*args, **kwargs).dtype
    if not dtype.is_floating_point:
        return target(*args, **kwargs)
    wide = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double().contiguous() if t.is_floating_point() else t, (args, kwargs))
    return target(*wide[0], **wide[1]).to(dtype)


def strict_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, each sum in the order of K, whatever the number of rows and columns."""
    wide, w = x.double(), weight.double()
    total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float64)
    for k in range(weight.shape[1]):
        total = total + wide[..., k : k + 1] * w[:, k]
    return (total if bias is None else total + bias.double()).to(x.dtype)


def evaluate(recipe: dict[str, Any], sources: dict[str, Tensor], computed: dict[str, Tensor]) -> Tensor:
    """A recipe applied with torch: small, slow, and independent of the packer the compiler uses."""
    op = recipe["op"]
    if op == "source":
        return sources[recipe["name"]]
    if op == "computed":
        return computed[recipe["key"]]
    if op in ("concat", "stack"):
        parts = [evaluate(r, sources, computed) for r in recipe["inputs"]]
        return torch.stack(parts) if op == "stack" else torch.cat(parts, recipe["axis"])
    value = evaluate(recipe["input"], sources, computed)
    if op == "transpose":
        return value.permute(recipe["axes"])
    if op == "pack":
        return pack(value)
    if op == "in_rows":
        return in_rows(recipe["input"], evaluate(recipe["input"]["input"], sources, computed))
    if op in ("quantize", "quantize_scales"):
        quants, scales = quantize(value, recipe["bits"], recipe["group"])
        return quants if op == "quantize" else scales
    if op in ("quantize_fp8", "quantize_fp8_scales"):
        wanted = value.float().abs().amax(dim=1, keepdim=True) / 448
        scales = wanted.to(value.dtype)
        scales = torch.where(scales.float() < wanted, scales.nextafter(torch.full_like(scales, torch.inf)), scales)
        return scales if op == "quantize_fp8_scales" else (value.float() / scales.float()).to(torch.float8_e4m3fn)
    raise AssertionError(f"unknown recipe op {op}")


def pack(weight: Tensor) -> Tensor:
    """The packed layout of docs/architecture.md."""
    if weight.dim() == 3:
        return torch.stack([pack(w) for w in weight])
    n, k = weight.shape
    wide = weight.dtype == torch.float32
    padded = torch.zeros(-(-n // 16) * 16, k if wide else -(-k // 32) * 32, dtype=weight.dtype)
    padded[:n, :k] = weight
    panels = padded.reshape(-1, 16, padded.shape[1]).transpose(1, 2)
    return panels.contiguous() if wide else panels.reshape(panels.shape[0], -1, 2, 16).transpose(2, 3).contiguous()


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Packed integers and scales of [N, K], as docs/artifact_format.md says."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // 16) * 16, -(-k // group) * group)
    padded[:n, :k] = weight.float()
    groups = padded.reshape(len(padded), -1, group)
    wanted = groups.abs().amax(dim=2) / (2 ** (bits - 1) - 1)
    scales = wanted.to(weight.dtype)
    scales = torch.where(scales.float() < wanted, scales.nextafter(torch.full_like(scales, torch.inf)), scales)
    quants = (groups / scales.float().where(scales != 0, 1.0)[..., None]).round().to(torch.int8).reshape(len(padded), -1)
    pairs = quants[:, : -(-k // 32) * 32].reshape(-1, 16, -(-k // 32) * 16, 2).transpose(1, 2).contiguous()
    stored = scales.reshape(-1, 16, scales.shape[1]).transpose(1, 2).contiguous()
    return (pairs, stored) if bits == 8 else ((pairs[..., 0] + 8 | (pairs[..., 1] + 8) << 4).to(torch.uint8), stored)


def in_rows(quantizing: dict[str, Any], weight: Tensor) -> Tensor:
    """What `quantize` makes of [N, K], in rows: artifacts/row_nodes.py."""
    n, k = weight.shape
    bits, group = quantizing["bits"], quantizing["group"]
    quants, scales = quantize(weight, bits, group)
    if quantizing["op"] == "quantize_scales":
        return scales.transpose(1, 2).reshape(-1, scales.shape[1])[:n].contiguous()
    if bits == 8:
        return quants.transpose(1, 2).reshape(len(quants) * 16, -1)[:n, :k].contiguous()
    columns = torch.stack([quants & 15, quants >> 4], dim=-1).transpose(1, 2).reshape(len(quants) * 16, -1)[:n, :k]
    runs = nn.functional.pad(columns, (0, -k % 64), value=8).reshape(n, -1, 2, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)


def capture(what: nn.Module | Callable[..., Any], *args: Tensor, dynamic: dict[str, dict[int, str]] | None = None) -> Case:
    """Export a module or function. Parameters become recipes with a source, buffers known values.

    dynamic: argument name -> {dimension: name of a symbolic size}.
    """
    module = what if isinstance(what, nn.Module) else _module(what)
    names = list(inspect.signature(module.forward).parameters)
    symbols = {s: torch.export.Dim(s, min=2, max=1 << 20) for d in (dynamic or {}).values() for s in d.values()}
    shapes = {name: {i: symbols[s] for i, s in (dynamic or {}).get(name, {}).items()} for name in names}
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(module, tuple(args), dynamic_shapes=shapes, strict=False)
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    tensors = {name: program.state_dict.get(name, program.constants.get(name)) for name in held.values()}
    inputs = {name: name for name in signature.user_inputs}
    gm = canonical_graph(_single_output(program.graph), inputs, {p: (name, tensors[name]) for p, name in held.items()})
    buffers = set(held.values()) - set(signature.inputs_to_parameters.values())
    table = WeightTable()
    for name in dict.fromkeys(n.target for n in gm.graph.nodes if n.op == "get_attr"):
        tensor, known = tensors[name], name in buffers
        recipe = {"op": "computed", "key": name} if known else {"op": "source", "name": name}
        value = tensor if known else None
        table.constants[name] = Constant(recipe=recipe, dtype=tensor.dtype, shape=tuple(tensor.shape), value=value)
        if known:
            table.computed[name] = tensor
    sources = {name: t.detach() for name, t in tensors.items() if name not in buffers}
    return Case(gm, PassContext(weights=table, max_positions=MAX_POSITIONS), sources, tuple(args))


def _module(function: Callable[..., Any]) -> nn.Module:
    module = nn.Module()
    module.forward = function  # type: ignore[method-assign]
    return module


def _single_output(graph: torch.fx.Graph) -> torch.fx.Graph:
    (outputs,) = graph.output_node().args
    assert len(outputs) == 1, "test modules return one tensor"
    return graph


def assert_golden(applied: Pass, case: Case, label: str = "") -> None:
    """The whole graph before and after, against tests/passes/golden. LLMC_ACCEPT=1 writes the file."""
    after, _ = case.apply(applied)
    text = f"--- before {applied.name}\n{case.text()}\n--- after {applied.name}\n{after.text()}"
    path = GOLDEN / f"{applied.name}{'.' if label else ''}{label}.txt"
    if os.environ.get("LLMC_ACCEPT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no golden {path.name}; write it with LLMC_ACCEPT=1 and read the diff"
    assert text == path.read_text(), f"{path.name} differs; LLMC_ACCEPT=1 rewrites it"


def assert_same_answers(applied: Pass, case: Case, *args: Tensor, torch_ops: bool = False) -> None:
    """The pass matches, and outputs and written caches are the same: bit for bit if EXACT, within its tolerance if CLOSE."""
    after, (report,) = case.apply(applied)
    assert report.result.matches > 0, f"{applied.name} matched nothing: {dict(report.result.refusals)}"
    assert_close(case.run(*args, torch_ops=torch_ops), after.run(*args, torch_ops=torch_ops), applied)


def assert_close(expected: list[Tensor], found: list[Tensor], applied: Pass | None) -> None:
    """Equal lists of tensors, by a pass's promise; None means bit for bit."""
    for want, have in zip(expected, found, strict=True):
        if applied is None or applied.numerics is Numerics.EXACT:
            assert torch.equal(want, have), f"bits differ by up to {(want - have).abs().max()}"
        else:
            within = TOLERANCES.get(want.dtype)
            rtol, atol = (within.rtol, within.atol) if within else (0.0, 0.0)
            torch.testing.assert_close(have, want, rtol=rtol, atol=atol)


def rejects(applied: Pass, case: Case) -> list[str]:
    """The reasons for which the pass left something alone, sorted; nothing may have matched."""
    _, (report,) = case.apply(applied)
    assert report.result.matches == 0
    return sorted(report.result.refusals.elements())


def unchanged(applied: Pass, case: Case) -> bool:
    """Whether the pass leaves the graph as it is, and says so."""
    after, (report,) = case.apply(applied)
    return not report.result.changed and after.text() == case.text()


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Seeded parameters for a module, in evaluation mode."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(seeded(*parameter.shape, seed=seed) * 0.3)
    return module.to(dtype).eval().requires_grad_(False)
