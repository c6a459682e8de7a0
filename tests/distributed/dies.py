"""For the test of a lost rank: imported by its config, in the ranks that MMDetection's own tool runs in."""

from __future__ import annotations

import os
import signal
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class DiesHook(Hook):
    """Kills one rank, as an operator that ends a process or a lack of memory does."""

    def __init__(self, *, rank: int, before_iteration: int) -> None:
        self.rank = rank
        self.before_iteration = before_iteration

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == self.rank and runner.iter == self.before_iteration:
            os.kill(os.getpid(), signal.SIGKILL)
