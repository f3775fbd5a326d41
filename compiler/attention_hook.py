"""The attention implementation that Hugging Face models are built with: one llmc op per layer.

Hugging Face hands every attention layer's q, k and v to the function registered under the model's attention
implementation. Ours hands them on to the `Attention` that the model was called with: the paged cache's writes the layer's
K and V and attends, in one op. What a model passes that it cannot express is refused by name, since leaving it out would
give wrong answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmc.errors import UnsupportedModel

IMPLEMENTATION = "llmc_paged"

# Flags that ride along in every model's kwargs and do not change what attention computes.
_HARMLESS = frozenset({"use_cache", "position_ids", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"})


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What one attention layer asks for."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int  # 0 = all


class Attention(Protocol):
    """What a model is called with as `llmc_paged`."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D]."""


@dataclass
class LayerProbe:
    """Stands in for the op during a dry run on the meta device and notes each layer's facts, in call order."""

    layers: list[LayerFacts] = field(default_factory=list)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """Note the layer; returns an empty tensor of the result's shape."""
        heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
        self.layers.append(LayerFacts(layer=layer, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, window=window))
        return torch.empty_like(query.transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class PagedAttention:
    """The op, bound to the step's inputs. k_cache, v_cache: per layer; group_of_layer: row of slot_mapping and block_tables."""

    k_cache: list[Tensor]
    v_cache: list[Tensor]
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    group_of_layer: tuple[int, ...]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """Emit llmc::paged_attention for one layer; B is 1, S the step's tokens. Shapes and meaning: docs/architecture.md."""
        result: Tensor = torch.ops.llmc.paged_attention.default(
            _flat(query),
            _flat(key),
            _flat(value),
            self.k_cache[layer],
            self.v_cache[layer],
            self.slot_mapping,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            layer,
            self.group_of_layer[layer],
            scale,
            window,
            softcap,
            sinks,
        )
        return result.unsqueeze(0)


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers. Harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _forward)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    llmc_paged: Attention,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D]."""
    check_attention(module, query, key, value, attention_mask, dropout, rest)
    result = llmc_paged.attend(
        query,
        key,
        value,
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        window=int(sliding_window or 0),
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        sinks=s_aux,
    )
    return result, None


def check_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float, rest: Mapping[str, Any]
) -> None:
    """Refuse what a layer asks of attention beyond causal attention with a scale, a window, a soft cap and sinks.

    Args:
        query, key, value: [B, heads, tokens, head_dim].
        rest: keyword arguments that the hook has no name for.

    Raises:
        UnsupportedModel: names the layer and what it asks for.
    """
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    unknown = sorted(name for name, given in rest.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise UnsupportedModel(f"{where}: attention is called with {', '.join(unknown)}, which llmc's paged attention does not take")
    if attention_mask is not None:
        raise UnsupportedModel(
            f"{where}: attention is called with a mask of its own; llmc's paged attention is causal, with an optional window"
        )
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModel(f"{where}: attention is not causal; llmc compiles causal language models")
    if key.shape[-1] != query.shape[-1] or value.shape[-1] != query.shape[-1]:
        raise UnsupportedModel(f"{where}: q, k and v differ in head size ({query.shape[-1]}, {key.shape[-1]}, {value.shape[-1]})")
    if dropout and module.training:
        raise UnsupportedModel(f"{where}: attention drops out; llmc compiles models for inference")


def _flat(heads: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D], as a view."""
    return heads.transpose(1, 2).squeeze(0)
