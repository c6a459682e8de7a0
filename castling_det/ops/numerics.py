"""Shared by the operators: which implementation runs, how it reads its inputs, norms and dtypes of sums."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "accumulation_dtype",
    "empty_gradients",
    "heads_of",
    "kernels",
    "length_of",
    "rows_of",
    "uses_kernels",
    "vector_norm",
    "without_autocast",
]

EPS = 1e-12
"""Vectors with a norm up to EPS are left unscaled: they have no direction and are treated as zero."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, else `dtype` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


_HAS_TRITON = find_spec("triton") is not None


def uses_kernels(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute for this tensor, rather than plain operations.

    On ROCm, on CUDA from compute capability 8.0 on, and on a CPU in Triton's interpreter (`TRITON_INTERPRET=1`), where
    Triton is installed, unless `CASTLING_DET_PLAIN=1` is set. Tensors of float64, wider than 128 columns or
    without elements are plain.
    """
    if not _HAS_TRITON or tensor.dtype == torch.float64 or tensor.shape[-1] > 128 or not tensor.numel():
        return False
    if os.environ.get("CASTLING_DET_PLAIN") == "1":
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def kernels(name: str) -> Any:
    """The module of an operator's kernels, imported where they run: Triton is not installed everywhere."""
    return import_module(f"castling_det.ops.triton_{name}")


def heads_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Heads (B, H, N, K) of separate tensors, or of one packed projection (B, N, 3, H, K), to compute with.

    Plain operations read half precisions in float32; kernels convert what they load, from rows that are dense.
    """
    last = inputs[-1]
    if not uses_kernels(last):
        inputs = [x.to(accumulation_dtype(last.dtype)) for x in inputs]
    else:
        inputs = [rows_of(x.to(last.dtype)) for x in inputs]
    return [x.transpose(1, 2) for x in inputs[0].unbind(2)] if len(inputs) == 1 else inputs


def empty_gradients(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Tensors for the gradients of an operator's inputs."""
    return [torch.empty_like(rows_of(x) if uses_kernels(x) else x) for x in inputs]


def rows_of(x: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
