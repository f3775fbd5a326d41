"""embedding: the plain torch meaning, the fake rule and the schema."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import check_packed

SCHEMA = "embedding(Tensor ids, Tensor weight, int embedding_dim) -> Tensor"
C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_embedding(AtenTensorHandle ids, AtenTensorHandle weight, int64_t embedding_dim, "
    "AtenTensorHandle* ret)"
)


def embedding_reference(ids: Tensor, weight: Tensor, embedding_dim: int) -> Tensor:
    """Rows of a packed matrix, bit for bit.

    ids: int64 [...]; weight: packed form of W [V, embedding_dim]. V is known up to the padding of 16 rows, which read as zeros.
    Returns [..., embedding_dim] in weight's dtype, contiguous.

    Raises:
        IndexError: an id is negative or past the last packed row.
    """
    check_embedding(ids, weight, embedding_dim)
    rows = weight.shape[0] * 16
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IndexError(f"llmc::embedding: ids lie in [{int(ids.min())}, {int(ids.max())}], the matrix has {rows} rows")
    picked = weight[ids // 16]  # [..., depth, 16] or [..., depth/2, 16, 2]
    lane = (ids % 16).reshape(*ids.shape, *([1] * (weight.dim() - 1)))
    axis = ids.dim() + 1
    shape = list(picked.shape)
    shape[axis] = 1
    row = torch.gather(picked, axis, lane.expand(shape)).flatten(ids.dim())
    return row[..., :embedding_dim].contiguous()


def embedding_fake(ids: Tensor, weight: Tensor, embedding_dim: int) -> Tensor:
    """Shape rule: [...] -> [..., embedding_dim]."""
    check_embedding(ids, weight, embedding_dim)
    return weight.new_empty((*ids.shape, embedding_dim))


def check_embedding(ids: Tensor, weight: Tensor, embedding_dim: int) -> None:
    """Refuse what no implementation takes."""
    if ids.dtype != torch.int64:
        raise RuntimeError(f"llmc::embedding: ids must be int64, got {ids.dtype}")
    check_packed(weight, int(weight.shape[0]) * 16, embedding_dim, weight.dtype)
