"""Shared by the operators: the eps of a norm, the dtype of an accumulation, a region without autocast."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["EPS", "accumulation_dtype", "length_of", "uses_kernels", "vector_norm", "without_autocast"]

EPS = 1e-12
"""Vectors with a norm up to EPS are left unscaled: they have no direction and are treated as zero."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def uses_kernels(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute for this tensor, rather than plain operations.

    On CUDA and ROCm where Triton is installed, and on a CPU in Triton's interpreter (`TRITON_INTERPRET=1`), unless
    `CASTLING_DET_PLAIN=1` says otherwise. float64 is always computed by plain operations.
    """
    if tensor.dtype == torch.float64 or os.environ.get("CASTLING_DET_PLAIN") == "1":
        return False
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast is off on the device of `tensor`."""
    device = tensor.device.type
    # Only where autocast is on: torch.export turns such a region into a nested graph, and cannot save the program.
    return torch.autocast(device_type=device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def vector_norm(x: Tensor) -> Tensor:
    """||x|| over the last axis, kept as an axis of size 1; its gradient at zero is zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def length_of(norm: Tensor, eps: Tensor | float = EPS) -> Tensor:
    """The divisor that normalises a vector: its norm, but 1 where norm <= eps.

    An all-zero token (padding, a dead row) stays zero and its gradient passes unscaled, instead of NaN or 1e12.
    """
    return torch.where(norm > eps, norm, 1.0)
