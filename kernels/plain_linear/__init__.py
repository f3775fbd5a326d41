"""plain_linear: schema, reference, fake rule."""

from .reference import SCHEMA, plain_linear_fake, plain_linear_reference

reference, fake = plain_linear_reference, plain_linear_fake

__all__ = ["SCHEMA", "fake", "plain_linear_fake", "plain_linear_reference", "reference"]
