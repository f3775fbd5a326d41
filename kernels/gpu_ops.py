"""The ops that graphs for a GPU are made of: SCHEMA, reference and fake of each.

Their implementations for a GPU are in `registry.py`; plain_grouped_linear has none, since sort-experts makes it moe_linear in every plan.
Those with a C_SHIM have a compiled CPU version too (norms, gated activations, rotation with the KV write); no graph for a CPU should hold
one of the others.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from . import (
    argmax,
    gelu_mul,
    moe,
    paged_attention,
    plain_grouped_linear,
    plain_linear,
    plain_quantized_linear,
    rms_norm,
    rope_kv_write,
    sample,
    silu_mul,
)

GPU_OPS: dict[str, ModuleType | SimpleNamespace] = {
    "rms_norm": rms_norm,
    "add_rms_norm": rms_norm.with_residual,
    "silu_mul": silu_mul,
    "gelu_mul": gelu_mul,
    "rope_kv_write": rope_kv_write,
    "paged_attend": paged_attention.attend,
    "plain_linear": plain_linear,
    "plain_grouped_linear": plain_grouped_linear,
    "plain_quantized_linear": plain_quantized_linear,
    "moe_route": moe.route,
    "moe_sort": moe.sort,
    "moe_linear": moe.linear,
    "moe_combine": moe.combine,
    "argmax": argmax,
    "sample": sample.draw,
    "adjust_logits": sample.adjust,
    "token_logprobs": sample.logprobs,
    "checked_tokens": sample.checked,
}
