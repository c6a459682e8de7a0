"""Decomposed relative positions of MViTv2 (arXiv 2112.01526): one table for rows, one for columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["relative_position_logits", "resized_table", "table_length"]


def table_length(query_size: int, key_size: int) -> int:
    """Distances along one axis between `query_size` queries and `key_size` keys that cover the same length."""
    return 2 * max(query_size, key_size) - 1


def resized_table(table: Tensor, length: int) -> Tensor:
    """The table (L, K) at another number of distances, (length, K): linear interpolation, as MViTv2 does it."""
    if table.shape[0] == length:
        return table
    return F.interpolate(table.t().unsqueeze(0), size=length, mode="linear")[0].t()


def relative_position_logits(
    q: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int], rel_pos_h: Tensor, rel_pos_w: Tensor
) -> Tensor:
    """What is added to the logits: each query times the vectors of its row and its column distance to the key.

    Args:
        q: queries, (B, H, N, K), N = height * width of `query_hw`, not scaled.
        query_hw: height and width of the queries' grid.
        key_hw: height and width of the keys' grid, over the same image.
        rel_pos_h: vectors of the row distances, (L, K), from the largest negative to the largest positive one.
        rel_pos_w: vectors of the column distances, likewise. Tables of another grid are interpolated.

    Returns:
        (B, H, N, number of keys).
    """
    q_map = q.unflatten(2, query_hw)
    rows = torch.einsum("bhyxk,yjk->bhyxj", q_map, _vectors(rel_pos_h, query_hw[0], key_hw[0]))
    columns = torch.einsum("bhyxk,xjk->bhyxj", q_map, _vectors(rel_pos_w, query_hw[1], key_hw[1]))
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)


def _vectors(table: Tensor, query_size: int, key_size: int) -> Tensor:
    """The vector for each pair of a query's and a key's place on one axis, (query_size, key_size, K)."""
    table = resized_table(table, table_length(query_size, key_size))
    # Places are counted in steps of the finer of the two grids.
    query_step, key_step = max(key_size / query_size, 1.0), max(query_size / key_size, 1.0)
    places = torch.arange(query_size, device=table.device)[:, None] * query_step
    distances = places - torch.arange(key_size, device=table.device)[None, :] * key_step
    return table[(distances + (key_size - 1) * key_step).long()]
