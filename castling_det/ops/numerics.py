"""What every op here agrees on: the eps of a norm, the dtype of an accumulation, the region without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["EPS", "accumulation_dtype", "inverse_norm", "without_autocast"]

EPS = 1e-12
"""A vector no longer than this has no direction: its normalised form and its gradient are zero."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast leaves the dtypes on the device of `tensor` alone."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / ||x|| over the last axis, kept as an axis of size 1; 0 where ||x|| <= EPS.

    Zero, not 1 / EPS, so that an all-zero token (padding, a dead row) gives neither NaN nor a gradient of 1e12.
    """
    squares = x.square().sum(dim=-1, keepdim=True)
    has_direction = squares > EPS * EPS
    # The inner where keeps rsqrt's gradient finite on the rows that the outer one discards.
    inverse = torch.where(has_direction, squares, 1.0).rsqrt()
    return torch.where(has_direction, inverse, 0.0)
