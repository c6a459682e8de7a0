"""What every op here agrees on: the eps of a norm, the dtype of an accumulation, the region without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["EPS", "accumulation_dtype", "length_of", "vector_norm", "without_autocast"]

EPS = 1e-12
"""A vector no longer than this has no direction: it is not stretched to length 1 but stays, in effect, zero."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast leaves the dtypes on the device of `tensor` alone."""
    device = tensor.device.type
    # A region of its own becomes a graph of its own in an exported program, which cannot be saved then.
    return torch.autocast(device_type=device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def vector_norm(x: Tensor) -> Tensor:
    """||x|| over the last axis, kept as an axis of size 1; its gradient at zero is zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def length_of(norm: Tensor, eps: Tensor | float = EPS) -> Tensor:
    """What a vector of this norm is divided by: the norm, and 1 where norm <= eps.

    So an all-zero token (padding, a dead row) stays zero and its gradient passes unscaled: neither NaN nor 1e12.
    """
    return torch.where(norm > eps, norm, 1.0)
