"""The meaning of llmc::plain_linear in plain torch, and its fake rule."""

from __future__ import annotations

from torch import Tensor

SCHEMA = "plain_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"


def plain_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias with the weight as the checkpoint holds it; llmc::linear takes it packed for a CPU instead.

    x: [..., K]; weight: [N, K]; bias: [N] or None; one dtype. Products, sum and bias in fp32, rounded once. Returns [..., N].
    """
    check_plain_linear(x, weight, bias)
    y = x.float() @ weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous()


def plain_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shape rule: [..., K] -> [..., N]."""
    check_plain_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def check_plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what no implementation takes."""
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise RuntimeError(
            f"llmc::plain_linear: weight must be {x.dtype} [N, {x.shape[-1]}] for x {list(x.shape)}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != x.dtype):
        raise RuntimeError(f"llmc::plain_linear: bias must be {x.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
