"""quantized_linear: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, quantized_linear_fake, quantized_linear_reference

reference, fake = quantized_linear_reference, quantized_linear_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "quantized_linear_fake", "quantized_linear_reference", "reference"]
