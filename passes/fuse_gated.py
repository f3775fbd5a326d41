"""What the fusions of gated activations share: act(gate) * up, in either order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from llmc.passes import graph as G
from llmc.passes.base import Reject

aten = torch.ops.aten


@dataclass(frozen=True)
class Gated:
    """A product of an activation and another value."""

    product: Node
    activation: Node
    gate: Node
    up: Node


def gated(product: Node, activation: Any) -> Gated | Reject | None:
    """The parts of `product`, a multiplication with an `activation` (an op) of something; None if it is none."""
    if not G.is_op(product, aten.mul.Tensor):
        return None
    left, right = G.args_of(product)
    act, up = (left, right) if G.is_op(left, activation) else (right, left)
    if not G.is_op(act, activation) or not isinstance(up, Node):
        return None
    gate = G.args_of(act)[0]
    if len(act.users) > 1:
        return Reject("something else reads the activation", act.name)
    if tuple(map(G.size_expr, G.val(gate).shape)) != tuple(map(G.size_expr, G.val(up).shape)):
        return Reject("gate and up differ in shape", (G.val(gate).shape, G.val(up).shape))
    if G.val(gate).dtype not in G.KERNEL_DTYPES or G.val(up).dtype != G.val(gate).dtype:
        return Reject("no kernel for these dtypes", (G.val(gate).dtype, G.val(up).dtype))
    return Gated(product, act, gate, up)
