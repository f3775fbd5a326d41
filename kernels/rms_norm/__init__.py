"""rms_norm and add_rms_norm: schemas, references, fake rules."""

from types import SimpleNamespace

from .reference import (
    ADD_C_SHIM,
    ADD_SCHEMA,
    C_SHIM,
    SCHEMA,
    add_rms_norm_fake,
    add_rms_norm_reference,
    rms_norm_fake,
    rms_norm_reference,
)

reference, fake = rms_norm_reference, rms_norm_fake
with_residual = SimpleNamespace(SCHEMA=ADD_SCHEMA, C_SHIM=ADD_C_SHIM, reference=add_rms_norm_reference, fake=add_rms_norm_fake)

__all__ = ["C_SHIM", "SCHEMA", "add_rms_norm_reference", "fake", "reference", "rms_norm_reference", "with_residual"]
