"""lora_add: schema, reference, fake rule."""

from .reference import C_SHIM, SCHEMA, lora_add_fake, lora_add_reference

reference, fake = lora_add_reference, lora_add_fake

__all__ = ["C_SHIM", "SCHEMA", "fake", "lora_add_fake", "lora_add_reference", "reference"]
