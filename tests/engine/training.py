"""A training of a second with dropout, augmentation in a worker, and validation; in a process that can be killed."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.hooks import checkpoint_hook as checkpoint_hook_module
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from castling_det.engine.hooks import WholeFileBackend
from tests.processes import process_context

__all__ = ["Dies", "result", "run", "train"]

ITERATIONS = 8
EXACT = {"type": "castling_det.ExactResumeHook"}
WHOLE = {"type": "castling_det.WholeCheckpointHook"}


class Points(Dataset):
    """Sixteen points, moved at random whenever they are read."""

    metainfo: ClassVar = dict(classes=("a",))

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(x=torch.full((64,), float(index)) + float(np.random.normal()))


class Regressor(BaseModel):
    """100 KB of weights, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.3), nn.Linear(256, 1))

    def forward(self, x: Any, mode: str = "loss") -> Any:
        if mode == "predict":
            return [dict(value=float(value)) for value in self.layers(x / 16)]
        return dict(loss=(self.layers(x / 16) - 1).square().mean())


class Mean(BaseMetric):
    """The mean prediction, which gets smaller in training."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [sample["value"] for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(bbox_mAP=float(np.mean(results)))


class Dies(Hook):
    """Kills the process in the middle of what it does at iteration `at`.

    `how`: `"write"`, by the kernel when half of the checkpoint is written; `"rename"`, before it takes its name;
    `"pointer"`, before `last_checkpoint` is written; `"remove"`, before the old one is removed; `"step"` in training;
    `"validation"`.
    """

    priority = "HIGHEST"

    def __init__(self, how: str, at: int) -> None:
        self.how, self.at = how, at

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if checkpoint["meta"]["iter"] != self.at:
            return
        if self.how == "write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores the signal otherwise
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        elif self.how == "rename":
            Path.replace = lambda *_: _die()  # type: ignore[assignment, method-assign]
        elif self.how == "pointer":
            checkpoint_hook_module.open = lambda *_: _die()
        elif self.how == "remove":
            WholeFileBackend.remove_outdated = lambda *_: _die()  # type: ignore[method-assign]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.how == "step" and runner.iter == self.at:
            _die()

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.how == "validation" and runner.iter == self.at:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _loader(shuffle: bool) -> dict[str, Any]:
    sampler = dict(type="InfiniteSampler") if shuffle else dict(type="DefaultSampler", shuffle=False)
    return dict(
        dataset=Points(),
        batch_size=4,
        num_workers=1,
        persistent_workers=True,
        sampler=sampler,
        collate_fn=dict(type="default_collate"),
    )


def train(work_dir: Path, hooks: dict[str, Any], dies: Dies | None = None) -> None:
    """Trains, resuming if there is something to resume, with `hooks` among the default ones."""
    torch.set_num_threads(1)
    torch.manual_seed(3)  # the model is built before the runner sets its seed
    Runner(
        model=Regressor(),
        work_dir=str(work_dir),
        train_dataloader=_loader(True),
        val_dataloader=_loader(False),
        val_cfg=dict(),
        val_evaluator=[Mean()],
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=ITERATIONS, val_interval=4),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=dict(type="CosineAnnealingLR", by_epoch=False, T_max=ITERATIONS),
        custom_hooks=[dict(type="EMAHook", momentum=0.5), *([dies] if dies else [])],
        default_hooks={"logger": dict(type="LoggerHook", interval=1), **hooks},
        log_processor=dict(by_epoch=False, window_size=1),
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        randomness=dict(seed=3),
        resume=True,
        default_scope="mmengine",
        experiment_name=f"{work_dir.name}-{os.getpid()}",
    ).train()


def checkpoint_hook(kind: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A checkpoint hook that saves at iterations 2, 4, 6, 8 and keeps one."""
    return {"checkpoint": dict(kind, by_epoch=False, interval=2, max_keep_ckpts=1, **options)}


def run(work_dir: Path, hooks: dict[str, Any], dies: Dies | None = None) -> int:
    """`train` in a process of its own; returns its exit code, negative for a signal."""
    process = process_context().Process(target=train, args=(work_dir, hooks, dies))
    process.start()
    process.join(timeout=300)
    if process.exitcode is None:
        process.kill()  # at its end pytest would wait for it
        raise AssertionError(f"the training in {work_dir} hangs")
    return process.exitcode


def result(work_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, average, and the optimizer's state."""
    checkpoint = torch.load(work_dir / f"iter_{ITERATIONS}.pth", weights_only=False)
    state = checkpoint["optimizer"]["state"]
    moments = {f"optimizer.{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}
    average = {f"ema.{name}": value for name, value in checkpoint["ema_state_dict"].items()}
    return {**checkpoint["state_dict"], **average, **moments}
