"""quantized_linear: the plain torch meaning, the fake rule and the schema."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = "quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int out_features, int group) -> Tensor"
C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_quantized_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scales, "
    "AtenTensorHandle* bias, int64_t out_features, int64_t group, AtenTensorHandle* ret)"
)


def unpack_quants(weight: Tensor, n: int, k: int) -> Tensor:
    """The integers [n, k] of a quantised packed weight, as int32.

    weight: int8 [panels, depth/2, 16, 2], or uint8 [panels, depth/2, 16] with two of 4 bits in a byte, 8 added, even depth low.
    """
    if weight.dtype == torch.uint8:
        weight = torch.stack([weight & 15, weight >> 4], dim=-1).to(torch.int32) - 8
    return weight.to(torch.int32).transpose(1, 2).reshape(weight.shape[0] * 16, -1)[:n, :k]


def weight_values(weight: Tensor, scales: Tensor, n: int, k: int, group: int) -> Tensor:
    """The matrix [n, k] that a quantised packed weight stands for, fp32: integer times scale, exact for scales of fp16 and bf16."""
    per_row = scales.transpose(1, 2).reshape(scales.shape[0] * 16, -1)[:n].float()
    spread = per_row.repeat_interleave(group, dim=1)[:, :k]
    return unpack_quants(weight, n, k).float() * spread


def dequantize(weight: Tensor, scales: Tensor, n: int, k: int, group: int) -> Tensor:
    """weight_values(...), rounded once to the dtype of `scales`."""
    return weight_values(weight, scales, n, k, group).to(scales.dtype)


def quantized_linear_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, group: int) -> Tensor:
    """x @ W^T + bias with W = weight_values(weight, scales), the meaning every faster version is held to.

    x: [..., K]; weight, scales: the quantised packed form of [out_features, K]; bias: [out_features] or None; x, scales and bias of one
    dtype of fp32, fp16, bf16. Products, sum and bias in fp32, rounded once to x's dtype. Returns [..., out_features], contiguous.
    The weights are not rounded to x's dtype: kernels sum integers times x by group, and scale the sum.
    """
    check_quantized_linear(x, weight, scales, bias, out_features, group)
    y = x.float() @ weight_values(weight, scales, out_features, x.shape[-1], group).t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous()


def quantized_linear_fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, group: int) -> Tensor:
    """Shape rule: [..., K] -> [..., out_features]."""
    check_quantized_linear(x, weight, scales, bias, out_features, group)
    return x.new_empty((*x.shape[:-1], out_features))


def check_quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, group: int) -> None:
    """Refuse what no implementation takes; shared by the reference and the fake rule."""
    check_quantized(weight, scales, out_features, x.shape[-1], group, x.dtype)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise RuntimeError(f"llmc::quantized_linear: bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")


def check_quantized(weight: Tensor, scales: Tensor, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    """Refuse weight and scales that are not the quantised packed form of [n, k] for `dtype`."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"llmc ops take float32, float16 and bfloat16, got {dtype}")
    if group < 32 or group % 32:
        raise RuntimeError(f"a quantised weight's group is a positive multiple of 32, got {group}")
    panels, pairs = (n + 15) // 16, (k + 31) // 32 * 16
    expected = {torch.int8: (panels, pairs, 16, 2), torch.uint8: (panels, pairs, 16)}.get(weight.dtype)
    if expected is None or tuple(weight.shape) != expected:
        raise RuntimeError(
            f"quantised weight of [{n}, {k}] must be int8 {[panels, pairs, 16, 2]} or uint8 {[panels, pairs, 16]}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if scales.dtype != dtype or tuple(scales.shape) != (panels, (k + group - 1) // group, 16):
        raise RuntimeError(
            f"scales of [{n}, {k}] must be {dtype} {[panels, (k + group - 1) // group, 16]}, got {scales.dtype} {list(scales.shape)}"
        )
