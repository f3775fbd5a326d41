"""From a model folder to the graph of one serving step.

    ModelSource -> TracedModel

The Hugging Face model itself is the front end: it is built without weights, with llmc's attention op in place of its own, and
traced by torch.export over a flat row of tokens. docs/architecture.md ("The captured graph") lists the inputs.

Sizes are symbolic. Their example values are large, since Inductor later takes them as hints: with many rows it spreads rows over
threads, never one row's sum, which would make a row's bits depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from llmc.artifacts.kv_bytes import cache_shape
from llmc.artifacts.manifest import KVFacts, KVGroup, TensorSpec
from llmc.compiler import skeleton
from llmc.compiler.attention_hook import LayerFacts, LayerProbe, PagedAttention
from llmc.compiler.canonical import canonical_graph
from llmc.compiler.checkpoint_names import parameter_recipe
from llmc.compiler.model import ModelSource
from llmc.errors import InternalError, UnsupportedModel
from llmc.passes.weights import Constant, WeightTable

# Example value and bounds of each symbolic size. A lower bound of 2 is what export's own checks assume; they only choose the general
# form of strides over a special one for size 1, and the general form holds for 1 as well (tests run T = B = N = M = 1).
_SIZES: dict[str, tuple[int, int]] = {
    "T": (4096, 1 << 20),  # tokens
    "N": (1024, 1 << 20),  # rows that need logits
    "B": (1024, 1 << 16),  # sequences
    "M": (256, 1 << 20),  # blocks per table row
    "NB": (64, 1 << 30),  # blocks; its example tensors are the only ones of any size, and are never touched
}


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """One step of a model as a graph, and what its constants and cache are.

    graph: placeholders are `inputs` in order ("." in a name becomes "_"); constants are get_attr nodes under their dotted names;
        every node has its fake value in meta["val"]. Parameters are fake, buffers real.
    constants: name -> dtype, shape and recipe; buffers carry their value.
    parameters: those of `constants` that are parameters of the model, each once (tied ones under their first name).
    """

    graph: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv: KVFacts
    constants: Mapping[str, Constant]
    parameters: tuple[str, ...]
    num_parameters: int  # elements, tied ones counted once
    max_model_len: int

    def untouched(self) -> TracedModel:
        """A copy whose graph stays as it is while passes change this one's."""
        graph, mapping = Graph(), {}  # type: ignore[var-annotated]
        graph.output(graph.graph_copy(self.graph.graph, mapping))
        return replace(self, graph=GraphModule(self.graph, graph))

    def weight_table(self) -> WeightTable:
        """A fresh table for the passes, with the buffers' bytes among its computed tensors."""
        computed = {name: constant.value for name, constant in self.constants.items() if constant.value is not None}
        return WeightTable(constants=dict(self.constants), computed=computed)


class _Step(nn.Module):
    """The function that is traced: flat tokens in, logits of the wanted rows out."""

    def __init__(self, model: nn.Module, group_of_layer: tuple[int, ...], hidden: bool) -> None:
        super().__init__()
        self.model = model
        self.group_of_layer = group_of_layer
        self.hidden = hidden

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_indices: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        k_cache: list[Tensor],
        v_cache: list[Tensor],
    ) -> Tensor:
        attention = PagedAttention(
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            group_of_layer=self.group_of_layer,
        )
        run = _hidden if self.hidden else _logits
        return run(self.model, input_ids, positions, logits_indices, attention)


def _hidden(model: nn.Module, input_ids: Tensor, positions: Tensor, rows: Tensor, attention: PagedAttention | LayerProbe) -> Tensor:
    """Hidden states of the wanted rows, as they come out of the decoder: behind its final norm, before any output projection."""
    output = model.base_model(  # type: ignore[operator]
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        past_key_values=None,
        use_cache=False,
        return_dict=True,
        llmc_paged=attention,
    )
    states: Tensor = output.last_hidden_state[:, rows, :][0]
    return states


def _logits(model: nn.Module, input_ids: Tensor, positions: Tensor, rows: Tensor, attention: PagedAttention | LayerProbe) -> Tensor:
    output = model(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        past_key_values=None,
        use_cache=False,
        logits_to_keep=rows,
        return_dict=True,
        llmc_paged=attention,
    )
    logits: Tensor = output.logits[0]
    return logits


def capture(
    source: ModelSource, *, block_size: int = 16, kv_dtype: str | None = None, max_model_len: int | None = None, hidden: bool = False
) -> TracedModel:
    """Trace a model. Reads no weights and allocates none.

    Args:
        source: the model folder, read.
        block_size: tokens per KV block.
        kv_dtype: of the cache, as `KVFacts.dtype`; None for the model's dtype.
        max_model_len: the longest sequence to serve; None for the model's maximum. Decides between longrope's two sets.
        hidden: the output is the hidden states of the wanted rows in place of their logits.

    Raises:
        UnsupportedModel: the model does something that the graph cannot hold; names the module.
    """
    dtype: torch.dtype = getattr(torch, source.dtype)
    length = source.max_position_embeddings if max_model_len is None else max_model_len
    model = skeleton.build_on_meta(source.config, dtype)
    skeleton.check_rope(model)
    layers = probe_layers(model)
    kv = _kv_facts(layers, block_size, kv_dtype or source.dtype)
    skeleton.compute_buffers(model)
    skeleton.fix_rope(model, length)
    mode = _fake_mode()
    skeleton.make_fake(model, mode)
    program = _export(model, kv, mode, hidden)
    constants = _constants(program, _tensor_names(model))
    graph = canonical_graph(program.graph, _input_names(kv), constants)
    output = _hidden_spec(source, graph) if hidden else _output_spec(source, graph)
    used = model.base_model if hidden else model
    return _traced(source, model, used, graph, kv, dict(constants.values()), length, output)  # type: ignore[arg-type]


def _fake_mode() -> FakeTensorMode:
    # the settings torch.export would make for itself; ours exists first because the parameters are born in it
    env = ShapeEnv(tracked_fakes=[], prefer_deferred_runtime_asserts_over_guards=False, trace_asserts=True)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)


def probe_layers(model: nn.Module) -> list[LayerFacts]:
    """Run the model once on the meta device, where nothing is computed, to see how each layer attends."""
    probe = LayerProbe()
    with torch.no_grad(), torch.device("meta"), skeleton.rope_held(model):
        ids = torch.zeros(2, dtype=torch.int64)
        _logits(model, ids, ids, ids, probe)
    if [facts.layer for facts in probe.layers] != list(range(len(probe.layers))) or not probe.layers:
        seen = [facts.layer for facts in probe.layers]
        raise UnsupportedModel(f"{type(model).__name__}: expected every layer to attend once, in order; saw layers {seen}")
    return probe.layers


def _kv_facts(layers: list[LayerFacts], block_size: int, kv_dtype: str) -> KVFacts:
    """Group layers by their window, groups in order of first appearance."""
    windows = list(dict.fromkeys(facts.window for facts in layers))
    return KVFacts(
        block_size=block_size,
        dtype=kv_dtype,  # type: ignore[arg-type]
        num_kv_heads=[facts.num_kv_heads for facts in layers],
        head_dim=[facts.head_dim for facts in layers],
        groups=[KVGroup(layers=[f.layer for f in layers if f.window == window], window=window) for window in windows],
    )


def _group_of_layer(kv: KVFacts) -> tuple[int, ...]:
    of = {layer: index for index, group in enumerate(kv.groups) for layer in group.layers}
    return tuple(of[layer] for layer in range(len(kv.head_dim)))


def _export(model: nn.Module, kv: KVFacts, mode: FakeTensorMode, hidden: bool) -> ExportedProgram:
    arguments, shapes = _example(kv)
    step = _Step(model, _group_of_layer(kv), hidden)
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with oblivious, torch.no_grad(), tracing(TracingContext(mode)):
        return torch.export.export(step, (), kwargs=arguments, dynamic_shapes=shapes, strict=False)


def _example(kv: KVFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example arguments and which of their sizes are symbolic."""
    dims = {name: Dim(name, min=2, max=bound) for name, (_, bound) in _SIZES.items()}
    size = {name: example for name, (example, _) in _SIZES.items()}
    groups = len(kv.groups)
    dtype = getattr(torch, kv.dtype)

    def ints(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def cache() -> list[Tensor]:
        return [torch.empty(cache_shape(kv, layer, size["NB"]), dtype=dtype) for layer in range(len(kv.head_dim))]

    arguments = {
        "input_ids": ints(size["T"], dtype=torch.int64),
        "positions": ints(size["T"], dtype=torch.int64),
        "logits_indices": ints(size["N"], dtype=torch.int64),
        "slot_mapping": ints(groups, size["T"], dtype=torch.int64),
        "block_tables": ints(groups, size["B"], size["M"], dtype=torch.int32),
        "seq_lens": ints(size["B"], dtype=torch.int32),
        "query_start_loc": ints(size["B"] + 1, dtype=torch.int32),
        "k_cache": cache(),
        "v_cache": cache(),
    }
    per_layer = [{0: dims["NB"]}] * len(kv.head_dim)
    shapes = {
        "input_ids": {0: dims["T"]},
        "positions": {0: dims["T"]},
        "logits_indices": {0: dims["N"]},
        "slot_mapping": {1: dims["T"]},
        "block_tables": {1: dims["B"], 2: dims["M"]},
        "seq_lens": {0: dims["B"]},
        "query_start_loc": {0: dims["B"] + 1},
        "k_cache": per_layer,
        "v_cache": per_layer,
    }
    return arguments, shapes


def input_specs(kv: KVFacts) -> tuple[TensorSpec, ...]:
    """The graph's inputs, as docs/architecture.md lists them."""
    groups = len(kv.groups)
    specs = [
        TensorSpec(name="input_ids", dtype="int64", shape=["T"]),
        TensorSpec(name="positions", dtype="int64", shape=["T"]),
        TensorSpec(name="logits_indices", dtype="int64", shape=["N"]),
        TensorSpec(name="slot_mapping", dtype="int64", shape=[groups, "T"]),
        TensorSpec(name="block_tables", dtype="int32", shape=[groups, "B", "M"]),
        TensorSpec(name="seq_lens", dtype="int32", shape=["B"]),
        TensorSpec(name="query_start_loc", dtype="int32", shape=["B + 1"]),
    ]
    for layer in range(len(kv.head_dim)):
        shape: list[int | str] = ["NB", *cache_shape(kv, layer, 1)[1:]]
        specs += [TensorSpec(name=f"{kind}_cache.{layer}", dtype=kv.dtype, shape=shape) for kind in ("k", "v")]
    return tuple(specs)


def _input_names(kv: KVFacts) -> dict[str, str]:
    """Exported placeholder -> our placeholder, in our order (K and V of a layer side by side). The names happen to be equal."""
    return {name: name for name in (spec.name.replace(".", "_") for spec in input_specs(kv))}


def _tensor_names(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter and buffer -> all its names in the model, in order."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    return names


def _constants(program: ExportedProgram, names: dict[int, list[str]]) -> dict[str, tuple[str, Tensor]]:
    """Exported placeholder -> (our constant name, tensor). Tensors are told apart by identity: all fakes have the same data_ptr."""
    signature = program.graph_signature
    tensors: dict[str, Tensor] = {}
    for placeholder, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        found = program.state_dict.get(target)
        tensors[placeholder] = program.constants[target] if found is None else found
    for placeholder, target in signature.inputs_to_lifted_tensor_constants.items():
        tensors[placeholder] = program.constants[target]
    by_placeholder: dict[str, tuple[str, Tensor]] = {}
    lifted: dict[int, str] = {}
    for placeholder, tensor in tensors.items():
        known = names.get(id(tensor))
        name = known[0] if known else lifted.setdefault(id(tensor), f"constant.{len(lifted)}")
        by_placeholder[placeholder] = (name, tensor)
    return by_placeholder


def _traced(
    source: ModelSource,
    model: nn.Module,
    used: nn.Module,
    graph: GraphModule,
    kv: KVFacts,
    tensors: dict[str, Tensor],
    max_model_len: int,
    output: TensorSpec,
) -> TracedModel:
    names = _tensor_names(model)
    constants: dict[str, Constant] = {}
    for name in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"):
        tensor = tensors[name]
        if isinstance(tensor, nn.Parameter):
            constants[name] = _parameter(source, model, names[id(tensor)], tensor)
        else:
            recipe = {"op": "computed", "key": name}
            constants[name] = Constant(recipe=recipe, dtype=tensor.dtype, shape=tuple(tensor.shape), value=tensor)
    parameters = tuple(name for name, constant in constants.items() if constant.value is None)
    held = {id(parameter) for parameter in used.parameters()}
    if {id(tensors[name]) for name in parameters} != held:
        raise InternalError(f"the graph reads {len(parameters)} parameters, the model has {len(held)}; please report this model")
    return TracedModel(
        graph=graph,
        inputs=input_specs(kv),
        outputs=(output,),
        kv=kv,
        constants=MappingProxyType(constants),
        parameters=parameters,
        num_parameters=sum(tensors[name].numel() for name in parameters),
        max_model_len=max_model_len,
    )


def _parameter(source: ModelSource, model: nn.Module, names: list[str], tensor: Tensor) -> Constant:
    shape = tuple(tensor.shape)
    recipe = parameter_recipe(
        names,
        shape,
        _dtype_name(tensor.dtype),
        model_type=source.model_type,
        base_prefix=str(getattr(model, "base_model_prefix", "")),
        tensors=source.tensors,
        stored=source.stored,
    )
    return Constant(recipe=recipe, dtype=tensor.dtype, shape=shape)


def _output_spec(source: ModelSource, graph: GraphModule) -> TensorSpec:
    logits = graph.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    if logits.shape[1] != source.vocab_size:
        raise UnsupportedModel(f"{source.path}: logits have width {logits.shape[1]}, the configuration's vocab_size is {source.vocab_size}")
    return TensorSpec(name="logits", dtype=_dtype_name(logits.dtype), shape=["N", source.vocab_size])  # type: ignore[arg-type]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hidden_spec(source: ModelSource, graph: GraphModule) -> TensorSpec:
    states = graph.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    if states.shape[1] != source.hidden_size:
        raise UnsupportedModel(f"{source.path}: hidden states have width {states.shape[1]}, the configuration's is {source.hidden_size}")
    return TensorSpec(name="hidden", dtype=_dtype_name(states.dtype), shape=["N", source.hidden_size])  # type: ignore[arg-type]
