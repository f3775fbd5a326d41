"""The meaning of llmc::rms_norm and llmc::add_rms_norm in plain torch, and their fake rules."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> Tensor"
ADD_SCHEMA = "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool round_first) -> (Tensor, Tensor)"


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension.

    x: [..., n]; weight: [n], any float dtype. Computed in fp32 and rounded to x's dtype. The models' conventions:
    Llama and most: offset 0, `round_first` (the quotient is rounded before the weight is applied, then again);
    Gemma: offset 1, rounded once; gpt-oss: offset 0, rounded once.
    """
    check_rms_norm(x, weight)
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        y = y.to(x.dtype).float()
    return (y * (offset + weight.float())).to(x.dtype).contiguous()


def rms_norm_fake(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """Shape rule: x's sizes, contiguous."""
    check_rms_norm(x, weight)
    return x.new_empty(x.shape)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to x's dtype: the residual stream of a layer and what its next part reads."""
    check_add_rms_norm(x, residual, weight)
    summed = (x.float() + residual.float()).to(x.dtype).contiguous()
    return rms_norm_reference(summed, weight, eps, offset, round_first), summed


def add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """Shape rule: two of x's sizes, contiguous."""
    check_add_rms_norm(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """Refuse what no implementation takes."""
    if x.dim() < 1 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise RuntimeError(f"llmc::rms_norm: weight must be [n] for x [..., n], got {list(weight.shape)} for {list(x.shape)}")


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Refuse what no implementation takes."""
    check_rms_norm(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise RuntimeError(
            f"llmc::add_rms_norm: x and residual must agree, got {x.dtype} {list(x.shape)} and {residual.dtype} {list(residual.shape)}"
        )
