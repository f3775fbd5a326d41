"""grouped_linear: the plain torch meaning, the fake rule and the schema."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import check_packed, linear_reference

SCHEMA = "grouped_linear(Tensor x, Tensor weight, Tensor expert_ids, Tensor? bias, int out_features) -> Tensor"
C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_grouped_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle expert_ids, "
    "AtenTensorHandle* bias, int64_t out_features, AtenTensorHandle* ret)"
)


def grouped_linear_reference(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Row r of x times expert `expert_ids[r]`: what linear gives for that row and that expert.

    x: [R, K]; weight: [E, ...], one packed [out_features, K] per expert; expert_ids: int64 [R]; bias: [E, out_features] or None.
    Returns [R, out_features] in x's dtype.

    Raises:
        IndexError: an expert id is outside [0, E).
    """
    check_grouped_linear(x, weight, expert_ids, bias, out_features)
    num_experts = weight.shape[0]
    if expert_ids.numel() and (int(expert_ids.min()) < 0 or int(expert_ids.max()) >= num_experts):
        raise IndexError(f"llmc::grouped_linear: expert ids must lie in [0, {num_experts}), got {expert_ids.tolist()}")
    y = x.new_empty((x.shape[0], out_features))
    for expert in expert_ids.unique().tolist():
        rows = expert_ids == expert
        y[rows] = linear_reference(x[rows], weight[expert], None if bias is None else bias[expert], out_features)
    return y


def grouped_linear_fake(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Shape rule: [R, K] -> [R, out_features]."""
    check_grouped_linear(x, weight, expert_ids, bias, out_features)
    return x.new_empty((x.shape[0], out_features))


def check_grouped_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None, out_features: int) -> None:
    """Refuse what no implementation takes."""
    if x.dim() != 2 or expert_ids.dim() != 1 or expert_ids.dtype != torch.int64:
        raise RuntimeError(
            "llmc::grouped_linear: x must be [R, K] and expert_ids int64 [R], "
            f"got {list(x.shape)} and {expert_ids.dtype} {list(expert_ids.shape)}"
        )
    torch._check(x.shape[0] == expert_ids.shape[0], lambda: "llmc::grouped_linear: x and expert_ids differ in rows")
    num_experts = int(weight.shape[0])
    check_packed(weight, out_features, x.shape[-1], x.dtype, (num_experts,))
    if bias is not None and (tuple(bias.shape) != (num_experts, out_features) or bias.dtype != x.dtype):
        raise RuntimeError(
            f"llmc::grouped_linear: bias must be {x.dtype} [{num_experts}, {out_features}], got {bias.dtype} {list(bias.shape)}"
        )
