"""Mixed precision in bfloat16 on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from castling_det.registry import OPTIM_WRAPPERS

__all__ = ["Bf16OptimWrapper"]


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """mmengine's `OptimWrapper` with the forward pass under bfloat16 autocast; on a CPU too, unlike `AmpOptimWrapper`.

    Parameters, their gradients and the optimizer stay in float32. bfloat16 has the range of float32: no loss is scaled.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Around the forward pass of `model`, on the device of its parameters."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
