"""The captured graph's constants as a quantised artifact will hold them: what its canaries and its accuracy are computed from.

A quantised tensor of the weight table is made of captured constants, whole, one under the other. Each of these is quantised and
dequantised here once, by the recipes that the artifact is packed with, into a file that is mapped and not held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.recipes import evaluate
from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler.capture import TracedModel
from llmc.compiler.packing import dtype_name, fetcher, to_numpy, to_torch
from llmc.errors import InternalError
from llmc.kernels.plain_quantized_linear.reference import dequantize_plain
from llmc.kernels.quantized_linear.reference import dequantize
from llmc.passes.weights import Constant, Recipe, WeightTable

_ROWS_ELEMENTS = 4 << 20  # of a matrix, quantised and dequantised at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How a captured constant is quantised. transposed: it is stored [K, N]."""

    bits: int
    group: int | None  # None: fp8, a scale per row
    transposed: bool


def quantized_bits(weights: WeightTable) -> dict[str, int]:
    """Name of each tensor of small numbers -> its bits."""
    recipes = {name: quantizing(weights[name].recipe) for name in weights}
    return {name: int(recipe.get("bits", 8)) for name, recipe in recipes.items() if recipe["op"] in ("quantize", "quantize_fp8")}


def quantizing(recipe: Recipe) -> Recipe:
    """The recipe of quantised values without their place in memory."""
    inner: Recipe = recipe["input"] if recipe["op"] == "in_rows" else recipe
    return inner


def dequantized_fetcher(traced: TracedModel, weights: WeightTable, checkpoint: Checkpoint, scratch: Path) -> Callable[[str], Tensor]:
    """Constant name of the captured graph -> its tensor, the quantised ones dequantised.

    Args:
        traced: as captured.
        weights: the table after the passes.
        scratch: a folder for the dequantised matrices, as large as these in the model's dtype.

    Raises:
        InternalError: a quantised tensor is not made of whole captured constants.
        ArtifactError: a weight holds NaN or infinity.
    """
    return dequantizing_fetcher(traced.constants, quantized_constants(traced, weights), checkpoint, scratch)


def dequantizing_fetcher(
    constants: Mapping[str, Constant], quantized: Mapping[str, Quantization], checkpoint: Checkpoint, scratch: Path
) -> Callable[[str], Tensor]:
    """Constant name -> its tensor, those of `quantized` quantised and dequantised as it says; otherwise as `dequantized_fetcher`."""
    plain = fetcher(constants, checkpoint)
    found: dict[str, Tensor] = {}
    for number, (name, how) in enumerate(quantized.items()):
        found[name] = _dequantized(constants[name], how, checkpoint, scratch / f"dequantized-{number}.bin")
    return lambda name: found[name] if name in found else plain(name)


def quantized_constants(traced: TracedModel, weights: WeightTable) -> dict[str, Quantization]:
    """Name of each captured constant that the weight table holds quantised -> how.

    Raises:
        InternalError: a quantised tensor is not made of whole captured constants.
    """
    by_recipe = {_text(constant.recipe): name for name, constant in traced.constants.items()}
    result: dict[str, Quantization] = {}
    for quantized in quantized_bits(weights):
        recipe = quantizing(weights[quantized].recipe)
        for part, transposed in _parts(recipe["input"], False):
            name = by_recipe.get(_text(part))
            if name is None:
                raise InternalError(f"{quantized} is not made of whole constants of the captured graph; please report this model")
            result[name] = Quantization(bits=recipe.get("bits", 8), group=recipe.get("group"), transposed=transposed)
    return result


def _parts(recipe: Recipe, transposed: bool) -> Iterator[tuple[Recipe, bool]]:
    """The recipes whose rows a matrix is made of, and whether each is stored the other way round."""
    if recipe["op"] == "transpose" and recipe["axes"] == [1, 0]:
        yield from _parts(recipe["input"], not transposed)
    elif recipe["op"] == "concat" and recipe["axis"] == int(transposed):
        for part in recipe["inputs"]:
            yield from _parts(part, transposed)
    else:
        yield recipe, transposed


def _text(recipe: Recipe) -> str:
    return json.dumps(recipe, sort_keys=True)


def _dequantized(constant: Constant, how: Quantization, checkpoint: Checkpoint, file: Path) -> Tensor:
    n, k = reversed(constant.shape) if how.transposed else constant.shape
    matrix: dict[str, Any] = {"op": "transpose", "axes": [1, 0], "input": constant.recipe} if how.transposed else constant.recipe
    specs, dtype = checkpoint.specs(), dtype_name(constant.dtype)
    step = max(16, _ROWS_ELEMENTS // k // 16 * 16)  # groups lie within a row, so rows may be cut anywhere
    with file.open("wb") as out:
        for start in range(0, n, step):
            stop = min(start + step, n)
            rows = {"op": "slice", "axis": 0, "start": start, "stop": stop, "input": matrix}

            def made(op: str, form: Mapping[str, int], rows: dict[str, Any] = rows) -> Any:
                return evaluate({"op": op, **form, "input": rows}, checkpoint.fetch, specs, {})

            if how.group is None:
                codes = to_torch(made("quantize_fp8", {}), torch.float8_e4m3fn)
                values = dequantize_plain(codes, to_torch(made("quantize_fp8_scales", {}), constant.dtype), k, k)
            else:
                form = {"bits": how.bits, "group": how.group}
                quants = to_torch(made("quantize", form), torch.int8 if how.bits == 8 else torch.uint8)
                values = dequantize(quants, to_torch(made("quantize_scales", form), constant.dtype), stop - start, k, how.group)
            out.write(to_numpy(values).tobytes())
    mapped = np.memmap(file, dtype=NUMPY[dtype], mode="r", shape=(n, k))
    tensor = to_torch(np.asarray(mapped), constant.dtype)
    return tensor.t() if how.transposed else tensor
