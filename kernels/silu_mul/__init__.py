"""silu_mul: schema, reference, fake rule."""

from .reference import C_SHIM, SCHEMA, silu_mul_fake, silu_mul_reference

reference, fake = silu_mul_reference, silu_mul_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "reference", "silu_mul_fake", "silu_mul_reference"]
