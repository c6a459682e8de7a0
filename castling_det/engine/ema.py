"""PicoDet's cycle-EMA (arXiv 2111.00902): an average of the weights that restarts every so many epochs."""

from __future__ import annotations

import logging

from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from castling_det.registry import HOOKS

__all__ = ["CycleEMAHook"]


@HOOKS.register_module()
class CycleEMAHook(EMAHook):
    """mmengine's `EMAHook` with `MomentumAnnealingEMA`, restarted from the current weights every `cycle_epochs`.

    The newest iterate has the weight `max(momentum, gamma / (gamma + t))`, t iterations after the restart; at t = 0 the
    average is a copy of the weights. With the defaults this is, one iteration late, the published decay
    `min(0.9998, (1 + t) / (10 + t))` of an average that starts at zero with its bias divided out. The restart follows
    from the epoch, and checkpoints hold t, so that a resumed run continues as if it had not stopped.

    Args:
        cycle_epochs: epochs between two restarts; published: 40 of 300.
        momentum: smallest weight of the newest iterate, in (0, 1).
        gamma: how fast the weight falls.
        update_buffers: average BatchNorm's statistics too, as published.
    """

    def __init__(
        self, *, cycle_epochs: int = 40, momentum: float = 0.0002, gamma: int = 9, update_buffers: bool = True
    ) -> None:
        if cycle_epochs < 1:
            raise ValueError(f"cycle_epochs={cycle_epochs}: expected at least 1 epoch, such as 40")
        super().__init__(ema_type="MomentumAnnealingEMA", momentum=momentum, gamma=gamma, update_buffers=update_buffers)
        self.cycle_epochs = cycle_epochs

    def before_train(self, runner: Runner) -> None:
        """Warns if the run ends before the first restart."""
        super().before_train(runner)
        if runner.max_epochs <= self.cycle_epochs:
            print_log(
                f"CycleEMAHook: cycle_epochs={self.cycle_epochs} but the run has max_epochs={runner.max_epochs}: the "
                "average is never restarted",
                logger="current",
                level=logging.WARNING,
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Restarts the average: after zero steps its next update copies the weights."""
        if runner.epoch and runner.epoch % self.cycle_epochs == 0:
            self.ema_model.steps.zero_()
