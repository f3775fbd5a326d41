"""The meaning of llmc::silu_mul in plain torch, and its fake rule."""

from __future__ import annotations

from torch import Tensor

SCHEMA = "silu_mul(Tensor gate, Tensor up) -> Tensor"

C_SHIM = "AOTITorchError aoti_torch_cpu_llmc_silu_mul(AtenTensorHandle gate, AtenTensorHandle up, AtenTensorHandle* ret)"


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the meaning every faster version is held to.

    gate, up: [..., intermediate], same dtype; often the two halves of one tensor. Computed in fp32 and rounded once.
    """
    check_gated("silu_mul", gate, up)
    wide = gate.float()
    return (wide * wide.sigmoid() * up.float()).to(gate.dtype).contiguous()


def silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    """Shape rule: gate's sizes, contiguous."""
    check_gated("silu_mul", gate, up)
    return gate.new_empty(gate.shape)


def check_gated(name: str, gate: Tensor, up: Tensor) -> None:
    """Refuse what no implementation takes."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() < 1:
        raise RuntimeError(f"llmc::{name}: gate and up must agree, got {gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}")
