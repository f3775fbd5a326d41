"""From the graph's constants to the artifact's weight files: recipes applied one tensor at a time, never a whole model in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from llmc.artifacts.manifest import TensorRecord, WeightFile
from llmc.artifacts.recipes import blocks, evaluate, infer, with_shapes
from llmc.artifacts.recipes import sources as recipe_sources
from llmc.artifacts.safetensors import Checkpoint
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter
from llmc.errors import InternalError
from llmc.passes.shard_tensor_parallel import is_sharded, of_rank
from llmc.passes.weights import Constant, WeightTable

WEIGHTS_PATH = "weights/model.safetensors"
COMPUTED_PATH = "weights/computed.safetensors"

Computed = Mapping[str, tuple[str, np.ndarray[Any, Any]]]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values as numpy carries them here: bf16 as uint16 bits."""
    contiguous = tensor.detach().contiguous()
    return (contiguous.view(torch.uint16) if tensor.dtype == torch.bfloat16 else contiguous).numpy()


def to_torch(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """The reverse of `to_numpy`; shares memory with a writable array, and with a mapped file that nobody writes to."""
    if not values.size:
        return torch.empty(values.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and nobody writes
        tensor = torch.frombuffer(values.reshape(-1).view(np.uint8).data, dtype=torch.uint8)
    return tensor.view(dtype).reshape(values.shape)


def computed_arrays(weights: WeightTable) -> Computed:
    """The tensors that exist without the checkpoint, as recipes read them."""
    return {key: (dtype_name(value.dtype), to_numpy(value)) for key, value in weights.computed.items()}


def order_of_use(graph: GraphModule) -> list[str]:
    """Constant names in the order in which the program first reads them; packed in that order, a step reads forward."""
    return list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"))


def pack(
    writer: ArtifactWriter, names: Iterable[str], weights: WeightTable, checkpoint: Checkpoint, *, embed: bool
) -> tuple[list[WeightFile], list[TensorRecord]]:
    """Write the constants `names` into the artifact.

    Args:
        embed: False leaves out what comes from the checkpoint; its records say how to make it (`file` is None), and only computed
            tensors are stored.

    Returns:
        The records for `Manifest.weights` and `Manifest.tensors`.

    Raises:
        InternalError: a recipe gives another dtype or shape than the graph reads.
        ArtifactError: the checkpoint lacks a tensor.
    """
    specs = checkpoint.specs()
    computed = computed_arrays(weights)
    computed_specs = {key: (dtype, values.shape) for key, (dtype, values) in computed.items()}
    stored: list[WeightTensor] = []
    external: list[TensorRecord] = []
    for name in names:
        constant = weights[name]
        _check(name, constant, infer(constant.recipe, specs, computed_specs))
        if embed or not recipe_sources(constant.recipe):
            stored.append(_weight_tensor(name, constant, checkpoint, specs, computed))
        else:
            external.append(_external(name, constant, specs))
    if not stored:
        return [], external
    file, records = writer.add_weights(WEIGHTS_PATH if embed else COMPUTED_PATH, stored)
    return [file], [*records, *external]


def pack_ranks(
    writer: ArtifactWriter, names: Iterable[str], weights: WeightTable, checkpoint: Checkpoint, ranks: int
) -> tuple[list[WeightFile], list[TensorRecord], list[dict[str, str]]]:
    """Write the constants `names` for several ranks: a file of each rank's own parts, and one of what all read.

    Returns:
        The records for `Manifest.weights` and `Manifest.tensors`, and per rank constant name -> tensor name.

    Raises:
        InternalError, ArtifactError: as `pack`.
    """
    specs, computed = checkpoint.specs(), computed_arrays(weights)
    computed_specs = {key: (dtype, values.shape) for key, (dtype, values) in computed.items()}
    shared: list[WeightTensor] = []
    own: list[list[WeightTensor]] = [[] for _ in range(ranks)]
    called: list[dict[str, str]] = [{} for _ in range(ranks)]
    for name in names:
        constant = weights[name]
        divided = is_sharded(constant.recipe)
        for rank in range(ranks):
            called[rank][name] = f"rank{rank}/{name}" if divided else name
            if rank and not divided:
                continue
            mine = replace(constant, recipe=of_rank(constant.recipe, rank))
            _check(name, mine, infer(mine.recipe, specs, computed_specs))
            (own[rank] if divided else shared).append(_weight_tensor(called[rank][name], mine, checkpoint, specs, computed))
    files: list[WeightFile] = []
    records: list[TensorRecord] = []
    for path, tensors in ((WEIGHTS_PATH, shared), *((f"weights/rank{rank}.safetensors", own[rank]) for rank in range(ranks))):
        file, written = writer.add_weights(path, tensors)
        files.append(file)
        records += written
    return files, records, called


def _check(name: str, constant: Constant, made: tuple[str, tuple[int, ...]]) -> None:
    wanted = (dtype_name(constant.dtype), constant.shape)
    if made != wanted:
        raise InternalError(
            f"the recipe of {name} gives {made[0]} {list(made[1])}, the graph reads {wanted[0]} {list(wanted[1])}; please report this"
        )


def _weight_tensor(
    name: str, constant: Constant, checkpoint: Checkpoint, specs: Mapping[str, tuple[str, tuple[int, ...]]], computed: Computed
) -> WeightTensor:
    return WeightTensor(
        name=name,
        dtype=dtype_name(constant.dtype),  # type: ignore[arg-type]
        shape=constant.shape,
        recipe=constant.recipe,
        blocks=lambda: blocks(constant.recipe, checkpoint.fetch, specs, computed),
    )


def _external(name: str, constant: Constant, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> TensorRecord:
    return TensorRecord(
        name=name,
        dtype=dtype_name(constant.dtype),  # type: ignore[arg-type]
        shape=list(constant.shape),
        file=None,
        offset=0,
        nbytes=constant.nbytes,
        recipe=dict(with_shapes(constant.recipe, specs)),  # the checkpoint bound later is another one
    )


def fetcher(constants: Mapping[str, Constant], checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """Constant name -> its real tensor, made when asked for. A plain checkpoint tensor is a view of the mapped file."""
    specs = checkpoint.specs()

    def fetch(name: str) -> Tensor:
        constant = constants[name]
        if constant.value is not None:
            return constant.value
        recipe = constant.recipe
        values = checkpoint.fetch(recipe["name"]) if recipe["op"] == "source" else evaluate(recipe, checkpoint.fetch, specs, {})
        return to_torch(values, constant.dtype)

    return fetch
