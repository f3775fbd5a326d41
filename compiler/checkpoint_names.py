"""From a parameter of the model to the checkpoint tensors it is made of.

Mostly the names are equal. Three differences exist among the supported models: a checkpoint of the bare decoder lacks the
prefix under which the causal language model holds it; a few modules have been renamed since; and mixture-of-experts
checkpoints store one matrix per expert where the model holds all of them in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.compiler.checkpoint_tensor import CheckpointTensor
from llmc.compiler.stored_quantization import StoredQuantization
from llmc.errors import UnsupportedModel

Recipe = dict[str, Any]

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExpertNames:
    """How a checkpoint names one layer's expert matrices: templates with {layer} and {expert}."""

    gate: str
    up: str
    down: str


_EXPERTS: dict[str, _ExpertNames] = {
    "mixtral": _ExpertNames(
        gate="{base}.block_sparse_moe.experts.{expert}.w1.weight",
        up="{base}.block_sparse_moe.experts.{expert}.w3.weight",
        down="{base}.block_sparse_moe.experts.{expert}.w2.weight",
    ),
    "qwen3_moe": _ExpertNames(
        gate="{base}.mlp.experts.{expert}.gate_proj.weight",
        up="{base}.mlp.experts.{expert}.up_proj.weight",
        down="{base}.mlp.experts.{expert}.down_proj.weight",
    ),
}

# Part of a parameter's name -> what stands there in checkpoints.
_RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": {"lm_head.": "embed_out."},
    "mixtral": {".mlp.": ".block_sparse_moe."},
}


def parameter_recipe(
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: str,
    *,
    model_type: str,
    base_prefix: str,
    tensors: Mapping[str, CheckpointTensor],
    stored: StoredQuantization | None = None,
) -> Recipe:
    """How to make one parameter from checkpoint tensors.

    Args:
        names: the parameter's names in the model, more than one if it is tied.
        shape: its shape there.
        dtype: its dtype there, "bfloat16"; a checkpoint of another float type is cast.
        model_type: decides how experts are named.
        base_prefix: the model's name for its decoder ("transformer"), which a checkpoint of the bare decoder leaves out.
        tensors: the checkpoint.
        stored: how its matrices are quantised already; None: they are not.

    Returns:
        A recipe (artifacts/recipes.py) that yields exactly `shape` and `dtype`.

    Raises:
        UnsupportedModel: the checkpoint lacks the tensor, or has it in another shape or in a dtype that is not a float.
    """
    for name in names:
        for candidate in _candidates(name, model_type, base_prefix):
            found = _matrix(candidate, shape, dtype, tensors, stored)
            if found is not None:
                return found
    experts = _expert_recipe(names[0], shape, dtype, model_type, tensors, stored)
    if experts is not None:
        return experts
    raise UnsupportedModel(
        f"the checkpoint has no tensor for parameter {names[0]!r} (shape {list(shape)}); it belongs to another model or is incomplete"
    )


def _candidates(name: str, model_type: str, base_prefix: str) -> list[str]:
    names = [name]
    for part, in_checkpoint in _RENAMED.get(model_type, {}).items():
        names.append(name.replace(part, in_checkpoint))
    return names + [n.removeprefix(base_prefix + ".") for n in names if n.startswith(base_prefix + ".")]


def _matrix(
    name: str, shape: tuple[int, ...], dtype: str, tensors: Mapping[str, CheckpointTensor], stored: StoredQuantization | None
) -> Recipe | None:
    """From the tensor `name`, or from what stands in its place where the checkpoint is quantised; None if there is neither."""
    quantized = stored.recipe(name, shape, dtype, tensors) if stored is not None else None
    if quantized is not None:
        return quantized
    return _source(tensors[name], shape, dtype) if name in tensors else None


def _source(tensor: CheckpointTensor, shape: tuple[int, ...], dtype: str) -> Recipe:
    if tensor.shape != shape:
        raise UnsupportedModel(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the configuration needs {list(shape)}; "
            "config.json and checkpoint do not belong together"
        )
    if tensor.dtype not in TORCH_NAMES:
        raise UnsupportedModel(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}; llmc reads float weights ({', '.join(TORCH_NAMES)})"
        )
    source: Recipe = {"op": "source", "name": tensor.name}
    return source if TORCH_NAMES[tensor.dtype] == dtype else {"op": "cast", "dtype": dtype, "input": source}


def _expert_recipe(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    model_type: str,
    tensors: Mapping[str, CheckpointTensor],
    stored: StoredQuantization | None,
) -> Recipe | None:
    """gate_up_proj [E, 2 * I, H] and down_proj [E, H, I] from one matrix per expert, gate above up."""
    names = _EXPERTS.get(model_type)
    base, found, kind = name.partition(".mlp.experts.")
    if names is None or not found or kind not in ("gate_up_proj", "down_proj"):
        return None

    def part(template: str, expert: int, part_shape: tuple[int, ...]) -> Recipe:
        wanted = template.format(base=base, expert=expert)
        found = _matrix(wanted, part_shape, dtype, tensors, stored)
        if found is None:
            raise UnsupportedModel(f"the checkpoint has no tensor {wanted!r}, which parameter {name!r} is made of")
        return found

    num_experts, rows, columns = shape
    if kind == "down_proj":
        return {"op": "stack", "inputs": [part(names.down, e, (rows, columns)) for e in range(num_experts)]}
    half = (rows // 2, columns)
    per_expert = [{"op": "concat", "axis": 0, "inputs": [part(t, e, half) for t in (names.gate, names.up)]} for e in range(num_experts)]
    return {"op": "stack", "inputs": per_expert}
