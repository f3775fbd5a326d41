"""paged_attention: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, paged_attention_fake, paged_attention_reference

reference, fake = paged_attention_reference, paged_attention_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "paged_attention_fake", "paged_attention_reference", "reference"]
