"""A training that was interrupted and resumed ends with the same weights as one that nobody disturbed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from castling_det.registry import HOOKS

__all__ = ["ExactResumeHook"]


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes what is random in an iteration follow from the seed and the iteration alone, and catches up when resuming.

    Three things differ between a resumed run and an undisturbed one with mmengine alone: the random generators (drop
    path) start anew; a loader's workers, whose augmentation is random too, have not drawn what they had drawn; and a
    validation during which the run was killed is not done again. Here every iteration sets the generators; resuming
    an iteration-based loop has the workers load once more what they had loaded (`replay_data`), and repeats the
    validation that belongs to the checkpoint. An epoch-based loop begins its epoch with fresh workers.

    Args:
        replay_data: load again what was trained on. False resumes sooner, with other augmentation than undisturbed.
    """

    priority = "LOWEST"

    def __init__(self, *, replay_data: bool = True) -> None:
        self.replay_data = replay_data

    def before_train(self, runner: Runner) -> None:
        """Catches up, if this run was resumed."""
        if runner.iter == 0:
            return
        if self.replay_data:
            _replay_when_skipping(runner.train_loop)
        if _validation_is_due(runner):
            runner.logger.info("The validation of the resumed checkpoint is done again, in case it was interrupted")
            # mmengine logs a validation without its iteration: it is that of the row before.
            runner.visualizer.add_scalars({"iter": runner.iter}, step=runner.iter)
            runner.val_loop.run()
        _set_generators(runner.seed, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the generators for the model."""
        _set_generators(runner.seed, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Sets them for data that this process loads itself (`num_workers=0`)."""
        _set_generators(runner.seed, runner.iter + 1)


def _set_generators(seed: int | None, iteration: int) -> None:
    torch_seed, numpy_seed = np.random.SeedSequence([seed or 0, iteration]).generate_state(2).tolist()
    random.seed(numpy_seed)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)


def _replay_when_skipping(loop: Any) -> None:
    """Where mmengine skips data by counting, has workers load it, so that they draw what they drew then."""
    iterator = getattr(loop, "dataloader_iterator", None)
    if iterator is None or loop.dataloader.num_workers == 0 or not hasattr(iterator, "skip_iter"):
        return

    def load(iterations: int) -> None:
        for _ in range(iterations):
            next(iterator)

    iterator.skip_iter = load


def _validation_is_due(runner: Runner) -> bool:
    loop = runner.train_loop
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    return runner.val_loop is not None and done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
