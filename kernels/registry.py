"""Which implementations an op has for a GPU, and the one place that chooses between them.

An implementation takes its op's arguments and, by keyword, `launch` and `device`; it returns what the op returns. `supports` takes
the op's arguments and returns the reason it cannot take them, or None. Order in a list is preference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One way to compute an op."""

    op: str  # name in the llmc namespace
    name: str
    supports: Callable[..., str | None]
    call: Callable[..., Any]


# Modules with IMPLEMENTATIONS, a tuple in order of preference. They import triton, so they are loaded when asked for.
_MODULES = {
    "rms_norm": "rms_norm.triton_impl",
    "add_rms_norm": "rms_norm.triton_impl",
    "silu_mul": "silu_mul.triton_impl",
    "gelu_mul": "gelu_mul.triton_impl",
    "rope_kv_write": "rope_kv_write.triton_impl",
    "paged_attention": "paged_attention.triton_impl",
    "paged_attend": "paged_attention.triton_impl",
    "plain_linear": "plain_linear.triton_impl",
    "plain_quantized_linear": "plain_quantized_linear.triton_impl",
    **dict.fromkeys(("moe_route", "moe_sort", "moe_linear", "moe_combine"), "moe.triton_impl"),
    "argmax": "argmax.triton_impl",
    **dict.fromkeys(("sample", "adjust_logits", "token_logprobs", "checked_tokens"), "sample.triton_impl"),
}
OPS: tuple[str, ...] = tuple(_MODULES)


def implementations(op: str) -> tuple[Implementation, ...]:
    """Every implementation of `op` for a GPU, best first; empty if it has none.

    Raises:
        ConfigError: triton is not installed.
    """
    if op not in _MODULES:
        return ()
    try:
        module = importlib.import_module(f"{__package__}.{_MODULES[op]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError("GPU kernels need triton, which is not installed: pip install 'llmc[cuda]'") from error
    found: tuple[Implementation, ...] = tuple(i for i in module.IMPLEMENTATIONS if i.op == op)
    return found


def choose(op: str, *args: Any) -> Implementation:
    """The best implementation of `op` that takes these arguments (real or fake tensors).

    Raises:
        UnsupportedModel: none takes them; the message holds each one's reason.
        ConfigError: triton is not installed.
    """
    reasons = []
    for candidate in implementations(op):
        reason = candidate.supports(*args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise UnsupportedModel(f"no GPU kernel for llmc::{op}: {'; '.join(reasons) or 'none is registered'}")
