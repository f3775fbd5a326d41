"""rope_kv_write: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, rope_kv_write_fake, rope_kv_write_reference

reference, fake = rope_kv_write_reference, rope_kv_write_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "reference", "rope_kv_write_fake", "rope_kv_write_reference"]
