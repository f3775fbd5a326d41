"""The meaning of llmc::gelu_mul in plain torch, and its fake rule."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..silu_mul.reference import check_gated

SCHEMA = "gelu_mul(Tensor gate, Tensor up, bool tanh) -> Tensor"

C_SHIM = "AOTITorchError aoti_torch_cpu_llmc_gelu_mul(AtenTensorHandle gate, AtenTensorHandle up, int32_t tanh, AtenTensorHandle* ret)"


def gelu_mul_reference(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """gelu(gate) * up, exact (erf) or by the tanh formula; fp32, rounded once. gate, up: [..., intermediate], same dtype."""
    check_gated("gelu_mul", gate, up)
    return (F.gelu(gate.float(), approximate="tanh" if tanh else "none") * up.float()).to(gate.dtype).contiguous()


def gelu_mul_fake(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """Shape rule: gate's sizes, contiguous."""
    check_gated("gelu_mul", gate, up)
    return gate.new_empty(gate.shape)
