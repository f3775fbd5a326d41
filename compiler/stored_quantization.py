"""Checkpoints that are quantised already: which of their tensors make a matrix, by `quantization_config` of config.json.

GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized, int-quantized, float-quantized, weights alone) of 4 and 8 bits are read. What
llmc cannot hold exactly is refused here, by name and with the reason. Layouts: artifacts/stored_nodes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.compiler.checkpoint_tensor import CheckpointTensor
from llmc.errors import UnsupportedModel

Recipe = dict[str, Any]

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# form -> what stands in the place of "weight": integers, scales, zero points (where there are any)
_PARTS = {
    "gptq": ("qweight", "scales", "qzeros"),
    "gptq_v2": ("qweight", "scales", "qzeros"),
    "awq": ("qweight", "scales", "qzeros"),
    "packed_rows": ("weight_packed", "weight_scale", "weight_zero_point"),
    "int8_rows": ("weight", "weight_scale", "weight_zero_point"),
    "fp8_rows": ("weight", "weight_scale", "weight_zero_point"),
}


_WHOLE = {"int8_rows": "I8", "fp8_rows": "F8_E4M3"}  # forms of one number to an element, and its type


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuantization:
    """How a checkpoint's matrices are quantised. group: inputs that share a scale; None: all of a row."""

    method: str
    form: str
    bits: int
    group: int | None
    symmetric: bool

    def recipe(self, name: str, shape: tuple[int, ...], dtype: str, tensors: Mapping[str, CheckpointTensor]) -> Recipe | None:
        """How to make the parameter `name` [N, K] of `dtype`; None where the checkpoint does not hold it quantised.

        Raises:
            UnsupportedModel: a part is missing, or `dtype` cannot hold the scales.
        """
        module, _, last = name.rpartition(".")
        quants, scales, zeros = (f"{module}.{part}" for part in _PARTS[self.form])
        if last != "weight" or len(shape) != 2 or quants not in tensors:
            return None
        if tensors[quants].dtype != _WHOLE.get(self.form, tensors[quants].dtype):
            return None  # a float beside the quantised ones, under the same kind of name
        if scales not in tensors:
            raise UnsupportedModel(f"{tensors[quants].file}: {quants!r} is quantised and has no {scales!r}; the checkpoint is incomplete")
        if f"{module}.weight_g_idx" in tensors:
            raise UnsupportedModel(f"{tensors[quants].file}: {module!r} {_ORDER}")
        if (missing := not self.symmetric or self.method in ("gptq", "awq")) and zeros not in tensors:
            raise UnsupportedModel(f"{tensors[quants].file}: {quants!r} is quantised and has no {zeros!r}; the checkpoint is incomplete")
        stored = _FLOATS.get(tensors[scales].dtype, tensors[scales].dtype)
        if dtype not in (stored, "float32"):
            raise UnsupportedModel(
                f"{tensors[scales].file}: {scales!r} is {stored}, and {dtype} cannot hold it exactly; compile with --dtype {stored}"
            )
        parts = [quants, scales, *([zeros] if missing else [])]
        return {
            "op": "dequantize",
            "form": self.form,
            "bits": self.bits,
            "group": self.group or shape[1],
            "symmetric": self.symmetric,
            "dtype": dtype,
            "shape": list(shape),
            "inputs": [{"op": "source", "name": part} for part in parts],
        }


_ORDER = (
    "orders its inputs by activation (act-order): groups are then scattered over the inputs, and llmc's kernels take runs of inputs; "
    "save the checkpoint without it (desc_act false, actorder null or weight)"
)


def read_stored(config: Mapping[str, Any], where: str) -> StoredQuantization | None:
    """What `quantization_config` says; None if there is none.

    Raises:
        UnsupportedModel: a method, or a form of it, that llmc does not read exactly.
    """
    raw = config.get("quantization_config", config.get("compression_config"))
    if raw is None:
        return None
    method = raw.get("quant_method", "unnamed") if isinstance(raw, Mapping) else "unnamed"
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if method not in readers:
        raise UnsupportedModel(
            f"{where}: the checkpoint is quantised (quantization_config, method {method!r}), which llmc does not read; "
            f"it reads {', '.join(readers)}, and unquantised checkpoints"
        )

    def refuse(reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{where}: the checkpoint is quantised by {method}, {reason}")

    stored = readers[method](raw, refuse)
    if stored.bits not in (4, 8):
        raise refuse(f"to {stored.bits} bits; llmc holds 4 and 8")
    if stored.bits == 8 and not stored.symmetric:
        raise refuse("to 8 bits with zero points; integer less zero point needs 9 bits, and llmc holds 8: take a symmetric one")
    if stored.group is not None and (stored.group < 32 or stored.group % 32):
        raise refuse(f"in groups of {stored.group}; llmc takes multiples of 32, and whole rows")
    return stored


def _gptq(raw: Mapping[str, Any], refuse: Any) -> StoredQuantization:
    group = _group(raw.get("group_size"), refuse)
    form = raw.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise refuse(f"in the checkpoint_format {form!r}; llmc reads gptq and gptq_v2")
    if raw.get("desc_act") and group is not None:
        raise refuse(f"which {_ORDER}")
    if raw.get("dynamic"):
        raise refuse("with settings per module (dynamic), which llmc does not read")
    return StoredQuantization(
        method="gptq", form=form, bits=_bits(raw.get("bits"), refuse), group=group, symmetric=bool(raw.get("sym", True))
    )


def _awq(raw: Mapping[str, Any], refuse: Any) -> StoredQuantization:
    version = str(raw.get("version", "gemm")).lower()
    if version != "gemm":
        raise refuse(f"in the version {version!r}; llmc reads gemm")
    bits = _bits(raw.get("bits", raw.get("w_bit")), refuse)
    if bits != 4:
        raise refuse(f"to {bits} bits; AWQ's layout is of 4")
    group = _group(raw.get("group_size", raw.get("q_group_size")), refuse)
    return StoredQuantization(method="awq", form="awq", bits=bits, group=group, symmetric=not raw.get("zero_point", True))


def _compressed(raw: Mapping[str, Any], refuse: Any) -> StoredQuantization:
    forms = {
        "int": {"pack-quantized": "packed_rows", "int-quantized": "int8_rows", "naive-quantized": "int8_rows"},
        "float": {"float-quantized": "fp8_rows", "naive-quantized": "fp8_rows"},
    }
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise refuse("with other than one config group; llmc reads one form for all linears")
    scheme = next(iter(groups.values()))
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        raise refuse("and its config group names no weights")
    if scheme.get("input_activations") is not None or scheme.get("output_activations") is not None:
        raise refuse(
            "activations included; llmc quantises weights alone, which would give other answers: take a weight-only one (W4A16, W8A16)"
        )
    if raw.get("kv_cache_scheme") is not None:
        raise refuse("KV cache included; compile one without kv_cache_scheme and give --kv-cache-dtype")
    if raw.get("sparsity_config") not in (None, {}) and raw["sparsity_config"].get("format") != "dense":
        raise refuse("and sparse; llmc reads dense weights")
    written, kind = raw.get("format") or scheme.get("format"), weights.get("type", "int")
    form = forms.get(str(kind), {}).get(str(written))
    if form is None:
        read = "; ".join(f"{', '.join(names)} of {name}" for name, names in forms.items())
        raise refuse(f"in the format {written!r} of {kind!r}; llmc reads {read}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise refuse(f"which {_ORDER}")
    strategy = weights.get("strategy", "channel")
    strategies = ("channel", "tensor") if form == "fp8_rows" else ("group", "channel")
    if strategy not in strategies:
        raise refuse(f"with the strategy {strategy!r}; llmc reads {' and '.join(strategies)}{' of fp8' if form == 'fp8_rows' else ''}")
    bits = _bits(weights.get("num_bits"), refuse)
    if form in _WHOLE and bits != 8:
        raise refuse(f"to {bits} bits, one to a byte; llmc reads 8 so, and 4 as pack-quantized")
    group = _group(weights.get("group_size"), refuse) if strategy == "group" else None
    symmetric = bool(weights.get("symmetric", True))
    return StoredQuantization(method="compressed-tensors", form=form, bits=bits, group=group, symmetric=symmetric)


def _bits(value: Any, refuse: Any) -> int:
    if type(value) is not int:
        raise refuse(f"and its number of bits is {value!r}; expected an integer")
    return value


def _group(value: Any, refuse: Any) -> int | None:
    if type(value) is not int or (value < 1 and value != -1):
        raise refuse(f"and its group size is {value!r}; expected a positive integer, or -1 for whole rows")
    return None if value == -1 else value
