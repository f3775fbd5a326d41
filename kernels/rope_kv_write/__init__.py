"""rope_kv_write: schema, reference, fake rule."""

from .reference import SCHEMA, rope_kv_write_fake, rope_kv_write_reference

reference, fake = rope_kv_write_reference, rope_kv_write_fake

__all__ = ["SCHEMA", "fake", "reference", "rope_kv_write_fake", "rope_kv_write_reference"]
