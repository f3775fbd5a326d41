"""Checkpoints quantised already, written word by word from the documented layouts, beside the float checkpoint that they stand for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.architectures import save_tiny_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantise. group None: whole rows."""

    form: str  # gptq, gptq_v2, awq, packed, int8, fp8, fp8 tensor
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    exact: bool = False  # scales of 4 bits, so that 4-bit integers times a scale are floats of 16 bits without rounding

    @property
    def config(self) -> dict[str, Any]:
        """`quantization_config` as the method's own writer puts it."""
        group = -1 if self.group is None else self.group
        if self.form in ("gptq", "gptq_v2"):
            return {"quant_method": "gptq", "bits": self.bits, "group_size": group, "desc_act": False, "sym": self.symmetric,
                    "checkpoint_format": self.form}  # fmt: skip
        if self.form == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not self.symmetric, "version": "gemm"}
        strategy = "channel" if self.group is None else "group"
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy}
        weights |= {"group_size": self.group, "dynamic": False, "actorder": None}
        if self.form.startswith("fp8"):
            weights |= {"type": "float", "strategy": "tensor" if self.form == "fp8 tensor" else strategy}
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        written = {"packed": "pack-quantized", "int8": "int-quantized"}.get(self.form, "float-quantized")
        groups = {"group_0": scheme}
        return {"quant_method": "compressed-tensors", "format": written, "config_groups": groups, "ignore": ["lm_head"],
                "kv_cache_scheme": None}  # fmt: skip


def words(values: Tensor, bits: int) -> Tensor:
    """[.., n] integers >= 0 as int32 [.., ceil(n / (32 / bits))], the first in the lowest bits."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    summed = (values << (torch.arange(per_word) * bits)).sum(dim=-1)
    return torch.where(summed >= 1 << 31, summed - (1 << 32), summed).to(torch.int32)


def awq_words(values: Tensor) -> Tensor:
    """[rows, n] as int32 [rows, n / 8], place i of a word holding column AWQ_ORDER[i]."""
    return words(values.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), 4)


def store(weight: Tensor, scheme: Scheme, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix [N, K] quantised: the tensors that stand in its place, by the end of their names, and what they stand for."""
    n, k = weight.shape
    if scheme.form.startswith("fp8"):
        largest = weight.abs().amax() if scheme.form == "fp8 tensor" else weight.abs().amax(dim=1, keepdim=True)
        scale = (largest.float() / 448).to(weight.dtype).reshape(-1, *[1] * (scheme.form == "fp8"))
        held = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": held, "weight_scale": scale}, (held.float() * scale.float()).to(weight.dtype)
    group, top = scheme.group or k, 1 << scheme.bits
    parts = torch.nn.functional.pad(weight.float(), (0, -k % group)).unflatten(1, (-1, group))
    scales = (parts.abs().amax(dim=2) / (top // 2 - 1)).to(weight.dtype)
    if scheme.exact:
        mantissa, exponent = torch.frexp(scales.float())
        scales = torch.ldexp((mantissa * 16).ceil() / 16, exponent).to(weight.dtype)
    zeros = torch.full(scales.shape, top // 2)
    if not scheme.symmetric:
        zeros = torch.randint(1, top - 1, scales.shape, generator=torch.Generator().manual_seed(seed))
    quants = (parts / scales.float()[..., None]).round() + zeros[..., None]
    quants = quants.clamp(0, top - 1).long()
    value = ((quants - zeros[..., None]).float() * scales.float()[..., None]).to(weight.dtype).flatten(1)[:, :k].contiguous()
    flat = quants.flatten(1)[:, :k]
    if scheme.form in ("gptq", "gptq_v2"):
        stored = zeros - (1 if scheme.form == "gptq" else 0)
        return {
            "qweight": words(flat, scheme.bits).t().contiguous(),
            "qzeros": words(stored.t(), scheme.bits),
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(k) // group).to(torch.int32),
        }, value
    if scheme.form == "awq":
        return {"qweight": awq_words(flat.t()), "qzeros": awq_words(zeros.t()), "scales": scales.t().contiguous()}, value
    if scheme.form == "int8":
        return {"weight": (flat - 128).to(torch.int8), "weight_scale": scales}, value
    made = {"weight_packed": words(flat, scheme.bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
    if not scheme.symmetric:
        made["weight_zero_point"] = words(zeros.t(), scheme.bits).t().contiguous()
    return made, value


def save_stored(name: str, folder: Path, scheme: Scheme) -> tuple[Path, Path]:
    """Two folders of one tiny model in float16: its linears quantised, and the same with the values that they stand for."""
    plain, quantized = folder / "plain", folder / "quantized"
    save_tiny_model(name, plain, torch.float16)
    tensors = load_file(plain / "model.safetensors")
    replaced, values = {}, dict(tensors)
    for seed, (key, tensor) in enumerate(sorted(tensors.items())):
        if key.endswith("_proj.weight"):
            made, values[key] = store(tensor, scheme, seed)
            replaced |= {f"{key.removesuffix('weight')}{part}": value for part, value in made.items()}
        else:
            replaced[key] = tensor
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(plain, quantized)
    save_file(replaced, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return plain, quantized
