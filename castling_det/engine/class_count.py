"""The hook that compares config, model and data before the first iteration."""

from __future__ import annotations

import logging

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from castling_det.datasets.checks import check_num_classes, raise_for_problems
from castling_det.datasets.config_checks import check_config
from castling_det.registry import HOOKS

__all__ = ["ClassCountHook"]


@HOOKS.register_module(name=["ClassCountHook", "DatasetCheckHook"])
class ClassCountHook(Hook):
    """Stops a run whose config and data disagree, before its first iteration.

    What a training would meet hours later is checked at once: the classes of the heads, of every loader and of the
    annotation files, and the file that the evaluator reads. The error lists all of it with the lines to write.
    Files that `CheckedCocoDataset` has checked when it was built are not read a second time.
    """

    def before_run(self, runner: Runner) -> None:
        """Checks the config as it stands, with the data of every loader that it trains or validates on."""
        used = {
            key: value
            for key, value in runner.cfg.items()
            if not key.startswith("test_") or runner.cfg.get("train_dataloader") is None
        }
        problems = check_config(used, level="names", trust_checked=True)
        for problem in problems:
            if problem.severity == "warning":
                print_log(str(problem), logger="current", level=logging.WARNING)
        raise_for_problems(problems, source=runner.cfg.filename or "the config")

    def before_train(self, runner: Runner) -> None:
        """Checks the model as it was built against the training data."""
        check_num_classes(runner.model, runner.train_dataloader.dataset.metainfo)

    def before_val(self, runner: Runner) -> None:
        """Checks against the validation data."""
        check_num_classes(runner.model, runner.val_dataloader.dataset.metainfo)

    def before_test(self, runner: Runner) -> None:
        """Checks against the test data."""
        check_num_classes(runner.model, runner.test_dataloader.dataset.metainfo)
