"""linear: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, linear_fake, linear_reference

reference, fake = linear_reference, linear_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "linear_fake", "linear_reference", "reference"]
