"""embedding: schema, reference, fake rule and the C shim's declaration."""

from .reference import C_SHIM, SCHEMA, embedding_fake, embedding_reference

reference, fake = embedding_reference, embedding_fake

__all__ = ["C_SHIM", "SCHEMA", "embedding_fake", "embedding_reference", "fake", "reference"]
