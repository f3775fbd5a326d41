"""argmax: schema, reference, fake rule."""

from .reference import SCHEMA, argmax_fake, argmax_reference

reference, fake = argmax_reference, argmax_fake

__all__ = ["SCHEMA", "argmax_fake", "argmax_reference", "fake", "reference"]
