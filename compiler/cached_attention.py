"""Standard attention with past keys and values, as other programs expect it in an exported model.

    past [B, Hkv, P, D] and the step's own k, v [B, Hkv, S, D] -> present [B, Hkv, P + S, D]

Handed to a model as `llmc_paged`, in the place of llmc's own paged cache: `attention_hook.py` calls whichever is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CachedAttention:
    """The past of every layer, and what the step adds to it.

    past: per layer, K and V [B, Hkv, P, D]. attention_mask: int64 [B, P + S], 0 at padding. present: filled layer by layer.
    """

    past: list[tuple[Tensor, Tensor]]
    attention_mask: Tensor
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D]. Appends to `present`.

        Scores and softmax are computed in float32. A row that may look nowhere (padding on the left) gives finite garbage.
        """
        past_key, past_value = self.past[layer]
        keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.present.append((keys, values))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            keys, values = (_repeat(heads, groups) for heads in (keys, values))
        scores = (query @ keys.transpose(2, 3)).float() * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~self._visible(query, past_key, window), torch.finfo(torch.float32).min)
        if sinks is None:
            weights = scores.softmax(dim=-1)
        else:  # a logit more in each row, whose share of the softmax goes nowhere
            sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        return (weights.to(values.dtype) @ values).transpose(1, 2)

    def _visible(self, query: Tensor, past_key: Tensor, window: int) -> Tensor:
        """bool [B, 1, S, P + S]: causal, within the window, no padding."""
        num_past, num_new = past_key.shape[2], query.shape[2]
        column = torch.arange(num_past + num_new)
        row = torch.arange(num_new).unsqueeze(1) + num_past
        visible = column <= row
        if window:
            visible = visible & (row - column < window)
        return visible & (self.attention_mask != 0)[:, None, None, :]


def _repeat(heads: Tensor, groups: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hkv * groups, S, D], each head `groups` times in a row."""
    batch, num, length, size = heads.shape
    return heads[:, :, None].expand(batch, num, groups, length, size).reshape(batch, num * groups, length, size)
