"""Mixed precision in float16 with loss scaling on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from castling_det.registry import OPTIM_WRAPPERS

__all__ = ["Fp16OptimWrapper"]


@OPTIM_WRAPPERS.register_module()
class Fp16OptimWrapper(OptimWrapper):
    """mmengine's `OptimWrapper` under float16 autocast, the loss scaled; on a CPU too, unlike `AmpOptimWrapper`.

    A step whose gradients overflow is skipped, and the scale halved; after `growth_interval` steps without one it is
    doubled. Parameters and optimizer stay in float32. The scale is logged as `loss_scale`.

    Args:
        loss_scale: the scale to begin with, > 0.
        growth_interval: steps without overflow after which the scale doubles.
        kwargs: of `OptimWrapper`.
    """

    def __init__(self, *, loss_scale: float = 2.0**16, growth_interval: int = 2000, **kwargs: Any) -> None:
        if not loss_scale > 0 or growth_interval < 1:
            raise ValueError(f"loss_scale={loss_scale}, growth_interval={growth_interval}: expected positive numbers")
        super().__init__(**kwargs)
        device = self.optimizer.param_groups[0]["params"][0].device.type
        self.loss_scaler = GradScaler(device, init_scale=loss_scale, growth_interval=growth_interval)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Gradients of the scaled loss."""
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Unscales, clips where the config says so, and steps unless a gradient has overflowed."""
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.message_hub.update_scalar("train/loss_scale", self.loss_scaler.get_scale())
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """As the base class's, with the scale under `"loss_scaler"`."""
        return {**super().state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; a training without loss scaling is gone on with, too."""
        state_dict = dict(state_dict)
        if "loss_scaler" in state_dict:
            self.loss_scaler.load_state_dict(state_dict.pop("loss_scaler"))
        super().load_state_dict(state_dict)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Around the forward pass of `model`, on the device of its parameters."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.float16):
            yield
