"""What every op here agrees on: the eps of a norm, the dtype of an accumulation, the region without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["EPS", "accumulation_dtype", "inverse_of", "packed_norms", "vector_norm", "without_autocast"]

EPS = 1e-12
"""A vector no longer than this has no direction: its normalised form and its gradient are zero."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast leaves the dtypes on the device of `tensor` alone."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def vector_norm(x: Tensor) -> Tensor:
    """||x|| over the last axis, kept as an axis of size 1; its gradient at zero is zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def packed_norms(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of queries and keys, (B, N, H, 1) each in the accumulation dtype, from the packed (B, N, 3, H, K).

    One pass over contiguous memory: over a slice of it, torch's reduction takes five times as long on a CPU.
    """
    norms = torch.linalg.vector_norm(qkv_BN3HK, dim=-1, keepdim=True, dtype=accumulation_dtype(qkv_BN3HK.dtype))
    q_norm, k_norm, _ = norms.unbind(2)
    return q_norm, k_norm


def inverse_of(norm: Tensor) -> Tensor:
    """1 / norm, and 0 where norm <= EPS.

    Zero, not 1 / EPS, so that an all-zero token (padding, a dead row) gives neither NaN nor a gradient of 1e12.
    """
    has_direction = norm > EPS
    # The inner where keeps the reciprocal's gradient finite on the rows that the outer one discards.
    inverse = torch.where(has_direction, norm, 1.0).reciprocal()
    return torch.where(has_direction, inverse, 0.0)
