"""The hook that compares the model's classes with the data's before the first iteration."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from castling_det.datasets.checks import check_num_classes
from castling_det.registry import HOOKS

__all__ = ["ClassCountHook"]


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Stops a run whose head counts other classes than its data set names; the error names both and the fix."""

    def before_train(self, runner: Runner) -> None:
        """Checks against the training data."""
        check_num_classes(runner.model, runner.train_dataloader.dataset.metainfo)

    def before_val(self, runner: Runner) -> None:
        """Checks against the validation data."""
        check_num_classes(runner.model, runner.val_dataloader.dataset.metainfo)

    def before_test(self, runner: Runner) -> None:
        """Checks against the test data."""
        check_num_classes(runner.model, runner.test_dataloader.dataset.metainfo)
