"""all_reduce: schema, reference, fake rule."""

from .reference import C_SHIM, SCHEMA, all_reduce_fake, all_reduce_reference, in_threads

reference, fake = all_reduce_reference, all_reduce_fake

__all__ = ["C_SHIM", "SCHEMA", "all_reduce_fake", "all_reduce_reference", "fake", "in_threads", "reference"]
