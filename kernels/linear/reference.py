"""linear: the plain torch meaning, the fake rule and the schema."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = "linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor"
C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, "
    "int64_t out_features, AtenTensorHandle* ret)"
)


def unpack_weight(weight: Tensor, n: int, k: int) -> Tensor:
    """The [n, k] matrix inside a packed weight ([panels, depth, 16] fp32 or [panels, depth/2, 16, 2]); same dtype, a copy."""
    panels = weight.shape[0]
    rows = weight.transpose(1, 2).reshape(panels * 16, -1)
    return rows[:n, :k].contiguous()


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x @ W^T + bias, the meaning every faster version is held to.

    x: [..., K]; weight: packed form of W [out_features, K]; bias: [out_features] or None; all one dtype of fp32, fp16, bf16.
    Products, sum and bias in fp32, rounded once to x's dtype. Returns [..., out_features], contiguous.
    """
    check_linear(x, weight, bias, out_features)
    wide = unpack_weight(weight, out_features, x.shape[-1]).float()
    y = x.float() @ wide.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous()


def linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Shape rule: [..., K] -> [..., out_features]."""
    check_linear(x, weight, bias, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Refuse what no implementation takes; shared by the reference and the fake rule."""
    check_packed(weight, out_features, x.shape[-1], x.dtype)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise RuntimeError(f"llmc::linear: bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")


def check_packed(weight: Tensor, n: int, k: int, dtype: torch.dtype, lead: tuple[int, ...] = ()) -> None:
    """Refuse a weight that is not the packed form of [*lead, n, k] in `dtype`."""
    panels = (n + 15) // 16
    if dtype == torch.float32:
        expected = (*lead, panels, k, 16)
    elif dtype in (torch.float16, torch.bfloat16):
        expected = (*lead, panels, (k + 31) // 32 * 16, 16, 2)
    else:
        raise RuntimeError(f"llmc ops take float32, float16 and bfloat16, got {dtype}")
    if weight.dtype != dtype or tuple(weight.shape) != expected:
        raise RuntimeError(f"packed weight must be {dtype} {list(expected)} for [{n}, {k}], got {weight.dtype} {list(weight.shape)}")
