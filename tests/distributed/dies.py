"""Imported by the ranks of a test: lets them start without a GPU, and has the hook that kills one of them."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

if not torch.cuda.is_available():
    # MMEngine sets a CUDA device before it joins the process group, whatever the backend.
    torch.cuda.set_device = lambda device: None


@HOOKS.register_module()
class DiesHook(Hook):
    """Kills one rank, as an operator that ends a process or a lack of memory does."""

    def __init__(self, *, rank: int, before_iteration: int) -> None:
        self.rank = rank
        self.before_iteration = before_iteration

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == self.rank and runner.iter == self.before_iteration:
            os.kill(os.getpid(), signal.SIGKILL)
