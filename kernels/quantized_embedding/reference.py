"""quantized_embedding: the plain torch meaning, the fake rule and the schema."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized_linear.reference import check_quantized, dequantize

SCHEMA = "quantized_embedding(Tensor ids, Tensor weight, Tensor scales, int embedding_dim, int group) -> Tensor"
C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_quantized_embedding(AtenTensorHandle ids, AtenTensorHandle weight, AtenTensorHandle scales, "
    "int64_t embedding_dim, int64_t group, AtenTensorHandle* ret)"
)


def quantized_embedding_reference(ids: Tensor, weight: Tensor, scales: Tensor, embedding_dim: int, group: int) -> Tensor:
    """Rows of dequantize(weight, scales).

    ids: int64 [...]; weight, scales: the quantised packed form of W [V, embedding_dim]. V is known up to the padding of 16 rows, which
    read as zeros. Returns [..., embedding_dim] in the dtype of `scales`, contiguous.

    Raises:
        IndexError: an id is negative or past the last packed row.
    """
    check_quantized_embedding(ids, weight, scales, embedding_dim, group)
    rows = weight.shape[0] * 16
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IndexError(f"llmc::quantized_embedding: ids lie in [{int(ids.min())}, {int(ids.max())}], the matrix has {rows} rows")
    return dequantize(weight, scales, rows, embedding_dim, group)[ids].contiguous()


def quantized_embedding_fake(ids: Tensor, weight: Tensor, scales: Tensor, embedding_dim: int, group: int) -> Tensor:
    """Shape rule: [...] -> [..., embedding_dim]."""
    check_quantized_embedding(ids, weight, scales, embedding_dim, group)
    return scales.new_empty((*ids.shape, embedding_dim))


def check_quantized_embedding(ids: Tensor, weight: Tensor, scales: Tensor, embedding_dim: int, group: int) -> None:
    """Refuse what no implementation takes."""
    if ids.dtype != torch.int64:
        raise RuntimeError(f"llmc::quantized_embedding: ids must be int64, got {ids.dtype}")
    check_quantized(weight, scales, int(weight.shape[0]) * 16, embedding_dim, group, scales.dtype)
