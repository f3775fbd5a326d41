"""plain_grouped_linear: schema, reference, fake rule."""

from .reference import SCHEMA, plain_grouped_linear_fake, plain_grouped_linear_reference

reference, fake = plain_grouped_linear_reference, plain_grouped_linear_fake

__all__ = ["SCHEMA", "fake", "plain_grouped_linear_fake", "plain_grouped_linear_reference", "reference"]
