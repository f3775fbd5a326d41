"""The meaning of the mixture-of-experts ops in plain torch, and their fake rules.

    weights, ids = moe_route(router logits, ...)             which experts each token goes to
    rows, tile_experts = moe_sort(ids, E, tile)              once per layer, for both of its matmuls
    y = moe_linear(x, gate_up, rows, tile_experts, ..., C)   activation; the same again with C = 1 for the way down
    out = moe_combine(y, weights)

Letters: T tokens, E experts, C choices of a token, S = T * C rows (row s belongs to token s // C), B rows of a tile, X tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain_linear.reference import plain_linear_reference

ROUTE_SCHEMA = "moe_route(Tensor logits, int top_k, bool softmax_first, bool renormalise, bool wide) -> (Tensor, Tensor)"
SORT_SCHEMA = "moe_sort(Tensor expert_ids, int num_experts, int tile) -> (Tensor, Tensor)"
LINEAR_SCHEMA = (
    "moe_linear(Tensor x, Tensor weight, Tensor rows, Tensor tile_experts, Tensor? bias, int num_rows, int rows_per_token) -> Tensor"
)
COMBINE_SCHEMA = "moe_combine(Tensor y, Tensor weights) -> Tensor"


def moe_route_reference(logits: Tensor, top_k: int, softmax_first: bool, renormalise: bool, wide: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first; of equals the lower id. A NaN counts as minus infinity.

    Args:
        logits: [T, E], the router's.
        top_k: C, at most E.
        softmax_first: weights are softmax over all experts (Qwen3-MoE, Mixtral); else over the chosen alone (gpt-oss), which
            renormalises by itself.
        renormalise: the chosen weights are divided by their sum (norm_topk_prob; Mixtral always).
        wide: weights stay fp32 (Mixtral), else they are rounded to the dtype of the logits.

    Returns:
        (weights [T, C], ids int64 [T, C]). Computed in fp32.
    """
    check_moe_route(logits, top_k)
    scores = torch.where(logits.isnan(), float("-inf"), logits.float())
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if softmax_first:
        weights = scores.softmax(1).gather(1, ids)
        if renormalise:
            weights = weights / weights.sum(1, keepdim=True)
    else:
        weights = scores.gather(1, ids).softmax(1)
    return (weights if wide else weights.to(logits.dtype)), ids.contiguous()


def moe_route_fake(logits: Tensor, top_k: int, softmax_first: bool, renormalise: bool, wide: bool) -> tuple[Tensor, Tensor]:
    """Shape rule: [T, E] -> two of [T, C]."""
    check_moe_route(logits, top_k)
    sizes = (logits.shape[0], top_k)
    return logits.new_empty(sizes, dtype=torch.float32 if wide else logits.dtype), logits.new_empty(sizes, dtype=torch.int64)


def check_moe_route(logits: Tensor, top_k: int) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or not 0 < top_k <= logits.shape[1]:
        raise RuntimeError(f"llmc::moe_route: expected logits [T, E] and 0 < top_k <= E, got {list(logits.shape)} and top_k {top_k}")


def tile_rows(num_rows: int, num_experts: int) -> int:
    """A tile as high as an expert's share of the rows, were they spread evenly: 16 to 128, a power of two."""
    share = -(-num_rows // num_experts)
    return 16 if share <= 32 else 64 if share <= 512 else 128


def most_tiles(num_rows: int, num_experts: int, tile: int) -> int:
    """Tiles that any spread of the rows over the experts can need."""
    return min(num_rows, num_rows // tile + num_experts)


def moe_sort_reference(expert_ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their experts, each expert's filled up to whole tiles.

    expert_ids: int64 [T, C], ids outside [0, E) are left out. Returns (rows int32 [X * B]: row s, or -1 where a tile is not full,
    s ascending within an expert; tile_experts int32 [X]: the tile's expert, -1 past the last tile). What `rows` holds in tiles past the
    last is -1 here and anything elsewhere.
    """
    check_moe_sort(expert_ids, tile)
    flat = expert_ids.flatten()
    num_tiles = most_tiles(flat.numel(), num_experts, tile)
    rows = flat.new_full((num_tiles * tile,), -1, dtype=torch.int32)
    tile_experts = flat.new_full((num_tiles,), -1, dtype=torch.int32)
    first = 0
    for expert in range(num_experts):
        mine = (flat == expert).nonzero().flatten()
        rows[first * tile : first * tile + mine.numel()] = mine.to(torch.int32)
        tiles = -(-mine.numel() // tile)
        tile_experts[first : first + tiles] = expert
        first += tiles
    return rows, tile_experts


def moe_sort_fake(expert_ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Shape rule: int64 [T, C] -> int32 [X * B], int32 [X]."""
    check_moe_sort(expert_ids, tile)
    num_tiles = most_tiles(expert_ids.numel(), num_experts, tile)
    return expert_ids.new_empty((num_tiles * tile,), dtype=torch.int32), expert_ids.new_empty((num_tiles,), dtype=torch.int32)


def check_moe_sort(expert_ids: Tensor, tile: int) -> None:
    """Refuse what no implementation takes."""
    if expert_ids.dim() != 2 or expert_ids.dtype != torch.int64 or tile not in (16, 32, 64, 128):
        raise RuntimeError(
            f"llmc::moe_sort: expected expert_ids int64 [T, C] and a tile of 16, 32, 64 or 128 rows, "
            f"got {expert_ids.dtype} {list(expert_ids.shape)} and tile {tile}"
        )


def moe_linear_reference(
    x: Tensor, weight: Tensor, rows: Tensor, tile_experts: Tensor, bias: Tensor | None, num_rows: int, rows_per_token: int
) -> Tensor:
    """Row s: x[s // rows_per_token] times the weight of its expert, as plain_linear gives it.

    x: [S / rows_per_token, K]; weight: [E, N, K]; rows, tile_experts: of moe_sort; bias: [E, N] or None; num_rows: S. Returns [S, N];
    a row that moe_sort left out is zero here and not written elsewhere.
    """
    check_moe_linear(x, weight, rows, tile_experts, bias, num_rows, rows_per_token)
    y = x.new_zeros((num_rows, weight.shape[1]))
    tile = rows.shape[0] // max(1, tile_experts.shape[0])
    for i, expert in enumerate(tile_experts.tolist()):
        if expert >= 0:
            mine = rows[i * tile : (i + 1) * tile].long()
            mine = mine[mine >= 0]
            y[mine] = plain_linear_reference(x[mine // rows_per_token], weight[expert], None if bias is None else bias[expert])
    return y


def moe_linear_fake(
    x: Tensor, weight: Tensor, rows: Tensor, tile_experts: Tensor, bias: Tensor | None, num_rows: int, rows_per_token: int
) -> Tensor:
    """Shape rule: [S, N]."""
    check_moe_linear(x, weight, rows, tile_experts, bias, num_rows, rows_per_token)
    return x.new_empty((num_rows, weight.shape[1]))


def check_moe_linear(
    x: Tensor, weight: Tensor, rows: Tensor, tile_experts: Tensor, bias: Tensor | None, num_rows: int, rows_per_token: int
) -> None:
    """Refuse what no implementation takes."""
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or weight.dtype != x.dtype:
        raise RuntimeError(
            f"llmc::moe_linear: expected x [tokens, K] and weight [E, N, K] of one dtype, "
            f"got {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    if rows.dtype != torch.int32 or tile_experts.dtype != torch.int32:
        raise RuntimeError(f"llmc::moe_linear: rows and tile_experts must be int32, got {rows.dtype} and {tile_experts.dtype}")
    torch._check(
        rows_per_token > 0 and x.shape[0] * rows_per_token == num_rows,
        lambda: f"llmc::moe_linear: {x.shape[0]} rows of x times {rows_per_token} are not {num_rows}",
    )
    if bias is not None and (bias.shape != weight.shape[:2] or bias.dtype != x.dtype):
        raise RuntimeError(f"llmc::moe_linear: bias must be {x.dtype} {list(weight.shape[:2])}, got {bias.dtype} {list(bias.shape)}")


def moe_combine_reference(y: Tensor, weights: Tensor) -> Tensor:
    """Each token's rows of y [T * C, N] times its weights [T, C], summed in their order in fp32, rounded once. Returns [T, N]."""
    check_moe_combine(y, weights)
    wide, scales = y.view(*weights.shape, y.shape[1]).float(), weights.float()
    total = wide.new_zeros((weights.shape[0], y.shape[1]))
    for choice in range(weights.shape[1]):
        total = total + wide[:, choice] * scales[:, choice, None]
    return total.to(y.dtype)


def moe_combine_fake(y: Tensor, weights: Tensor) -> Tensor:
    """Shape rule: [T * C, N] -> [T, N]."""
    check_moe_combine(y, weights)
    return y.new_empty((weights.shape[0], y.shape[1]))


def check_moe_combine(y: Tensor, weights: Tensor) -> None:
    """Refuse what no implementation takes."""
    if y.dim() != 2 or weights.dim() != 2:
        raise RuntimeError(f"llmc::moe_combine: expected y [T * C, N] and weights [T, C], got {list(y.shape)} and {list(weights.shape)}")
    torch._check(y.shape[0] == weights.numel(), lambda: f"llmc::moe_combine: {y.shape[0]} rows for weights {list(weights.shape)}")
