"""The meaning of llmc::rope_kv_write in plain torch, and its fake rule. Letters as in paged_attention's reference; P positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..paged_attention.reference import quantize_kv

SCHEMA = (
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float eps, float offset, bool round_first, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, int group) -> Tensor"
)


def rope_kv_write_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    group: int,
) -> Tensor:
    """Normalise q and k per head (if they have weights), rotate them, write k and v into the cache, return q.

    Args:
        q: [T, H, D]; k, v: [T, J, D].
        positions: int64 [T]. cos, sin: [P, R], the rotary tables, R even and at most D; the first R dimensions of a head are rotated,
            dimension i with i + R/2: x * cos + rotate_half(x) * sin. The others stay.
        q_weight, k_weight: [D] or None; eps, offset, round_first: as in rms_norm.
        k_cache, v_cache: [N, J, S, D], **written** at the slots of `slot_mapping` [G, T], row `group`; negative: not written.
            Also uint8, the bytes of fp8 e4m3, as in paged_attention.

    Returns:
        q, normalised and rotated, [T, H, D] contiguous. Computed in fp32; rounded after the norm and at the end.
    """
    check_rope(q, k, v, cos, sin)
    turned_q, turned_k = (
        _rotate(_norm(x, w, eps, offset, round_first), cos[positions], sin[positions]) for x, w in ((q, q_weight), (k, k_weight))
    )
    slots = slot_mapping[group]
    written = slots >= 0
    blocks, places = slots[written] // k_cache.shape[2], slots[written] % k_cache.shape[2]
    k_cache[blocks, :, places] = quantize_kv(turned_k[written], k_cache.dtype)
    v_cache[blocks, :, places] = quantize_kv(v[written], v_cache.dtype)
    return turned_q


def rope_kv_write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    group: int,
) -> Tensor:
    """Shape rule: q's sizes, contiguous."""
    check_rope(q, k, v, cos, sin)
    return q.new_empty(q.shape)


def check_rope(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse what no implementation takes."""
    rotated = cos.shape[-1]
    if cos.dim() != 2 or sin.shape != cos.shape or rotated % 2 or rotated > q.shape[-1]:
        raise RuntimeError(
            f"llmc::rope_kv_write: cos and sin must be [positions, even, at most {q.shape[-1]}], got {list(cos.shape)}, {list(sin.shape)}"
        )
    if k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"llmc::rope_kv_write: q, k and v disagree: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")


def _norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        y = y.to(x.dtype).float()
    return (y * (offset + weight.float())).to(x.dtype)


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    rotated = cos_TR.shape[-1]
    wide = x[..., :rotated].float()
    low, high = wide.chunk(2, dim=-1)
    turned = wide * cos_TR.float()[:, None] + torch.cat((-high, low), dim=-1) * sin_TR.float()[:, None]
    return torch.cat((turned.to(x.dtype), x[..., rotated:]), dim=-1).contiguous()
