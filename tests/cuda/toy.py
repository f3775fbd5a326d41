"""A small graph on fake CUDA tensors: a lookup, a norm, two matrix products with weights of one shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, symbolic_trace

aten = torch.ops.aten

ROWS, WIDTH, VOCAB = 8, 64, 96


class Toy(nn.Module):
    """Reads `ids` int64 [rows]; returns float32 [rows, width]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(VOCAB, width))
        self.register_buffer("first", torch.randn(width, width) / width**0.5)
        self.register_buffer("second", torch.randn(width, width) / width**0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        x = aten.index.Tensor(self.table, [ids])
        normal = aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(aten.mean.dim(aten.mul.Tensor(x, x), [-1], True), 1e-6)))
        hidden = aten.silu.default(aten.linear.default(normal, self.first))
        return (aten.add.Tensor(aten.linear.default(hidden, self.second), x),)


def on_fake_cuda(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """Trace a module of aten calls and put its buffers and inputs, without data, on cuda:0."""
    graph = symbolic_trace(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, buffer in list(graph.named_buffers()):
            setattr(graph, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda:0"))
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
    return graph


def toy_graph(width: int = WIDTH, rows: int = ROWS) -> GraphModule:
    """The toy, ready for `schedule`."""
    return on_fake_cuda(Toy(width), torch.zeros(rows, dtype=torch.int64))
