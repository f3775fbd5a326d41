"""gelu_mul: schema, reference, fake rule."""

from .reference import C_SHIM, SCHEMA, gelu_mul_fake, gelu_mul_reference

reference, fake = gelu_mul_reference, gelu_mul_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "gelu_mul_fake", "gelu_mul_reference", "reference"]
