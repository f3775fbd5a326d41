"""The parts of decoders that fusions look for, as Hugging Face spells them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmc.kernels.ops import overload
from tests.passes.modules import BLOCK, HEAD_DIM, HEADS, HIDDEN
from tests.passes.support import MAX_POSITIONS, Case, capture, fill, seeded


class Norm(nn.Module):
    """x / rms(x), then the weight. convention: "llama" rounds before the weight, "gemma" adds one to it, "gpt_oss" rounds after."""

    def __init__(self, convention: str = "llama", width: int = HIDDEN) -> None:
        super().__init__()
        self.convention = convention
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.convention == "gemma":
            return (y * (1.0 + self.weight.float())).type_as(x)
        if self.convention == "gpt_oss":
            return (self.weight * y).to(x.dtype)
        return self.weight * y.to(x.dtype)


class NormWithoutWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) + self.weight


class NarrowNorm(Norm):
    """Squares in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class NormOverRows(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))


def norm_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    return capture(fill(module, dtype), seeded(6, HIDDEN, dtype=dtype), dynamic={"x": {0: "T"}})


class Residual(nn.Module):
    """Two sums, each normalised and read again."""

    def __init__(self, broadcast: bool = False) -> None:
        super().__init__()
        self.norm, self.second, self.broadcast = Norm(), Norm("gemma"), broadcast

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = x + (y[:1] if self.broadcast else y)
        t = s + self.norm(s)
        return torch.cat((self.second(t), t), -1)


def residual_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    args = (seeded(6, HIDDEN, dtype=dtype), seeded(6, HIDDEN, dtype=dtype, seed=1))
    return capture(fill(module, dtype), *args, dynamic={"x": {0: "T"}, "y": {0: "T"}})


def rotate_half(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


class RotaryAttention(nn.Module):
    """Linear, norm of each head (or none), rotation, llmc.paged_attention, on two sequences of three tokens.

    rotated: dimensions of a head that are turned; all are, unless told otherwise.
    """

    def __init__(self, *, norms: str | None = "llama", rotated: int = HEAD_DIM, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2) * HEAD_DIM, bias=False)
        self.q_norm, self.k_norm = (Norm(norms, HEAD_DIM) if norms else nn.Identity() for _ in range(2))
        self.rotated = rotated
        angles = torch.arange(MAX_POSITIONS)[:, None] * 10.0 ** -(torch.arange(0, rotated, 2) / rotated)
        self.register_buffer("cos", self.spread(angles.cos()).to(dtype))
        self.register_buffer("sin", self.spread(angles.sin()).to(dtype))

    def spread(self, half: Tensor) -> Tensor:
        return torch.cat((half, half), -1)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, rest = x[..., : self.rotated], x[..., self.rotated :]
        turned = first * cos + rotate_half(first) * sin
        return turned if self.rotated == HEAD_DIM else torch.cat((turned, rest), -1)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        return cos[None, None], sin[None, None]

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        tables: Tensor,
        seq_lens: Tensor,
        starts: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        parts = self.qkv(x[None]).split([HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM], -1)
        q, k, v = (part.view(1, -1, part.shape[-1] // HEAD_DIM, HEAD_DIM) for part in parts)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        cos, sin = self.tables(positions)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        flat = [t.transpose(1, 2).squeeze(0) for t in (q, k, v)]
        attended = overload("paged_attention")(*flat, k_cache, v_cache, slots, tables, seq_lens, starts, 0, 0, 0.35, 0, 0.0, None)
        return attended.reshape(-1, HEADS * HEAD_DIM)


class HalvesAttention(RotaryAttention):
    """Tables of half the width, halves turned one by one, as gpt-oss does."""

    def spread(self, half: Tensor) -> Tensor:
        return half

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = torch.chunk(x, 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class NeighboursAttention(RotaryAttention):
    """Dimensions 0 and 1, 2 and 3, ... turned with each other, as GLM does."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin


class UnrotatedAttention(RotaryAttention):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x


class ComputedTables(RotaryAttention):
    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[None, None, :, None].to(self.cos.dtype) * self.cos[1]
        return angles.cos(), angles.sin()


class DoubleCosine(RotaryAttention):
    """q read with other tables than k."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", self.cos * 2)
        self.turns = 0

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self.turns += 1
        return super().turn(x, cos, self.other.index_select(0, torch.arange(x.shape[2]))[None, None] if self.turns % 2 else sin)


def rotary_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    caches = [torch.zeros(4, 1, BLOCK, HEAD_DIM, dtype=dtype) for _ in range(2)]
    tables = {name: value.clone() for name, value in module.named_buffers()}
    module = fill(module, dtype)
    for name, value in tables.items():  # fill casts them too
        setattr(module, name, value)
    return capture(
        module,
        seeded(6, HIDDEN, dtype=dtype),
        torch.tensor([0, 1, 2, 7, 8, 9]),
        torch.tensor([[4, 5, 6, 8, 9, -1]]),
        torch.tensor([[[1], [2]]], dtype=torch.int32),
        torch.tensor([3, 3], dtype=torch.int32),
        torch.tensor([0, 3, 6], dtype=torch.int32),
        *caches,
        dynamic={"x": {0: "T"}, "positions": {0: "T"}, "slots": {1: "T"}},
    )
