"""The small modules passes are tested on, each the part of a decoder a pass looks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc.kernels.ops import overload
from tests.passes.support import Case, capture, fill, seeded

HIDDEN, HEADS, HEAD_DIM, BLOCK = 24, 2, 8, 4


class Attention(nn.Module):
    """q, k, v by linears of one input, then llmc.paged_attention; two sequences of three tokens."""

    def __init__(self, biases: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(HIDDEN, n, bias=b) for n, b in zip((16, 8, 8), biases, strict=True))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(
        self, x: Tensor, slots: Tensor, tables: Tensor, seq_lens: Tensor, starts: Tensor, k_cache_0: Tensor, v_cache_0: Tensor
    ) -> Tensor:
        q, k, v = (t.view(-1, t.shape[-1] // HEAD_DIM, HEAD_DIM) for t in self.qkv(x))
        attended = overload("paged_attention")(q, k, v, k_cache_0, v_cache_0, slots, tables, seq_lens, starts, 0, 0, 0.35, 0, 0.0, None)
        return attended.reshape(-1, HEADS * HEAD_DIM)


class AttentionOverTwoInputs(Attention):
    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x * 2)


class AttentionOverOneLinear(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(HIDDEN, 32, bias=False)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).split([16, 8, 8], -1)
        return q, k, v


def attention_case(module: nn.Module) -> Case:
    caches = [torch.zeros(4, 1, BLOCK, HEAD_DIM) for _ in range(2)]
    return capture(
        fill(module),
        seeded(6, HIDDEN),
        torch.tensor([[4, 5, 6, 8, 9, 10]]),
        torch.tensor([[[1], [2]]], dtype=torch.int32),
        torch.tensor([3, 3], dtype=torch.int32),
        torch.tensor([0, 3, 6], dtype=torch.int32),
        *caches,
        dynamic={"x": {0: "T"}, "slots": {1: "T"}},
    )


class GatedMLP(nn.Module):
    def __init__(self, activation: str = "silu", gate_bias: bool = False, up_bias: bool = False, up_width: int = 40) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(HIDDEN, 40, bias=gate_bias)
        self.up_proj = nn.Linear(HIDDEN, up_width, bias=up_bias)
        self.down_proj = nn.Linear(40, HIDDEN, bias=False)

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_written_out":
            return x * 0.5 * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))
        return getattr(F, self.activation)(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class GatedOverTwoInputs(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x + 1))


class SquaredLinear(GatedMLP):
    """silu(gate) * gate: one linear, nothing to merge."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act(gate) * gate)


def mlp_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    return capture(fill(module, dtype), seeded(1, 6, HIDDEN, dtype=dtype), dynamic={"x": {1: "T"}})


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LastLayer(nn.Module):
    """A last layer and head. cumsum stands for attention: each row needs the rows before it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm, self.norm = Norm(), Norm(), Norm()
        self.o_proj, self.mlp, self.head = nn.Linear(HIDDEN, HIDDEN), GatedMLP(), nn.Linear(HIDDEN, 50, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(0)
        mixed = torch.cumsum(self.input_norm(h), 1).view(1, x.shape[0], 3, 8).reshape(1, x.shape[0], -1)
        h = h + self.o_proj(mixed)
        return self.norm(h + self.mlp(self.mlp_norm(h)))

    def forward(self, x: Tensor, logits_indices: Tensor) -> Tensor:
        return self.head(self.hidden(x)[:, logits_indices, :])[0]


class AllRowsReturned(LastLayer):
    """The sum over all rows is an answer too, so no row may go."""

    def forward(self, x: Tensor, logits_indices: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head(h[:, logits_indices, :])[0] + h.sum()


class RowsMixedLast(LastLayer):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.cumsum(x.unsqueeze(0), 1)


def last_layer_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    args = (seeded(7, HIDDEN, dtype=dtype), torch.tensor([6, 2, 2]))
    return capture(fill(module, dtype), *args, dynamic={"x": {0: "T"}, "logits_indices": {0: "N"}})


class Rope(nn.Module):
    """Rotary values as Hugging Face computes them, applied to x [T, 2, 8]."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 8, 2).float() / 8), persistent=False)

    def frequencies(self, positions: Tensor) -> Tensor:
        return positions[:, None].float() * self.inv_freq

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        angles = self.frequencies(positions.unsqueeze(0)[0])
        both = torch.cat((angles, angles), -1)
        cos, sin = (both.cos() * 1.1902).to(self.dtype)[:, None], (both.sin() * 1.1902).to(self.dtype)[:, None]
        turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * cos + turned * sin


class OuterProductRope(Rope):
    """Angles by matmul of a column and a row, as in older models."""

    def frequencies(self, positions: Tensor) -> Tensor:
        return (self.inv_freq[:, None] @ positions[None, :].float()).transpose(0, 1)


class LengthRope(Rope):
    """Frequencies that depend on the longest position of the batch."""

    def frequencies(self, positions: Tensor) -> Tensor:
        stretch = torch.where(positions.max() > 16, 2.0, 1.0)
        return super().frequencies(positions) / stretch


class LearnedRope(Rope):
    """Frequencies from the checkpoint, unknown while compiling."""

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.ones(4))


class SineOfData(Rope):
    """A sine that has nothing to do with positions alone."""

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return x.sin() + positions[:, None, None]


def rope_case(module: nn.Module, dtype: torch.dtype = torch.float32, tokens: int = 11) -> Case:
    positions = (torch.arange(tokens) * 7) % 64
    return capture(module.eval(), positions, seeded(tokens, 2, 8, dtype=dtype), dynamic={"positions": {0: "T"}, "x": {0: "T"}})
