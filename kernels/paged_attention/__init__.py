"""paged_attention: schema, reference, fake rule and the C shim's declaration; paged_attend, its second half."""

from types import SimpleNamespace

from .reference import (
    ATTEND_C_SHIM,
    ATTEND_SCHEMA,
    C_SHIM,
    SCHEMA,
    paged_attend_fake,
    paged_attend_reference,
    paged_attention_fake,
    paged_attention_reference,
)

reference, fake = paged_attention_reference, paged_attention_fake
attend = SimpleNamespace(SCHEMA=ATTEND_SCHEMA, C_SHIM=ATTEND_C_SHIM, reference=paged_attend_reference, fake=paged_attend_fake)

__all__ = [
    "C_SHIM",
    "SCHEMA",
    "attend",
    "fake",
    "paged_attend_reference",
    "paged_attention_fake",
    "paged_attention_reference",
    "reference",
]
