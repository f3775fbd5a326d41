"""quantized_embedding: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, quantized_embedding_fake, quantized_embedding_reference

reference, fake = quantized_embedding_reference, quantized_embedding_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "quantized_embedding_fake", "quantized_embedding_reference", "reference"]
