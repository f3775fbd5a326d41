"""grouped_linear: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, grouped_linear_fake, grouped_linear_reference

reference, fake = grouped_linear_reference, grouped_linear_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "grouped_linear_fake", "grouped_linear_reference", "reference"]
