"""The meaning of llmc::plain_grouped_linear in plain torch, and its fake rule."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain_linear.reference import plain_linear_reference

SCHEMA = "plain_grouped_linear(Tensor x, Tensor weight, Tensor expert_ids, Tensor? bias) -> Tensor"


def plain_grouped_linear_reference(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None) -> Tensor:
    """Row r of x times the weight of expert `expert_ids[r]`: what plain_linear gives for that row and that expert.

    x: [R, K]; weight: [E, N, K]; expert_ids: int64 [R]; bias: [E, N] or None. Returns [R, N] in x's dtype.

    Raises:
        IndexError: an expert id is outside [0, E). On a GPU such a row is left unwritten instead: nobody could be told.
    """
    check_plain_grouped_linear(x, weight, expert_ids, bias)
    num_experts = weight.shape[0]
    if expert_ids.numel() and (int(expert_ids.min()) < 0 or int(expert_ids.max()) >= num_experts):
        raise IndexError(f"llmc::plain_grouped_linear: expert ids must lie in [0, {num_experts}), got {expert_ids.tolist()}")
    y = x.new_empty((x.shape[0], weight.shape[1]))
    for expert in expert_ids.unique().tolist():
        rows = expert_ids == expert
        y[rows] = plain_linear_reference(x[rows], weight[expert], None if bias is None else bias[expert])
    return y


def plain_grouped_linear_fake(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None) -> Tensor:
    """Shape rule: [R, K] -> [R, N]."""
    check_plain_grouped_linear(x, weight, expert_ids, bias)
    return x.new_empty((x.shape[0], weight.shape[1]))


def check_plain_grouped_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None) -> None:
    """Refuse what no implementation takes."""
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or weight.dtype != x.dtype:
        raise RuntimeError(
            f"llmc::plain_grouped_linear: expected x [R, K] and weight [E, N, K] of one dtype, "
            f"got {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    if expert_ids.dim() != 1 or expert_ids.dtype != torch.int64:
        raise RuntimeError(f"llmc::plain_grouped_linear: expert_ids must be int64 [R], got {expert_ids.dtype} {list(expert_ids.shape)}")
    torch._check(x.shape[0] == expert_ids.shape[0], lambda: "llmc::plain_grouped_linear: x and expert_ids differ in rows")
    if bias is not None and (bias.shape != weight.shape[:2] or bias.dtype != x.dtype):
        raise RuntimeError(
            f"llmc::plain_grouped_linear: bias must be {x.dtype} {list(weight.shape[:2])}, got {bias.dtype} {list(bias.shape)}"
        )
