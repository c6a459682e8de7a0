"""Hooks around a training: checks before it, dashboards, an exact resume, checkpoints that survive a kill."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.registry import VISBACKENDS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from castling_det.datasets.checks import check_num_classes, raise_for_problems
from castling_det.datasets.config_checks import check_config
from castling_det.files import atomic_write
from castling_det.registry import HOOKS

__all__ = ["ClassCountHook", "DashboardHook", "ExactResumeHook", "WholeCheckpointHook", "WholeFileBackend"]

_DASHBOARDS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend"}
"""Name of a dashboard and of its package, and mmengine's class for it."""
_WHOLE = "castling_det.whole"


@HOOKS.register_module(name=["ClassCountHook", "DatasetCheckHook"])
class ClassCountHook(Hook):
    """Stops a run whose config, model and data disagree before its first iteration; the error lists every problem.

    Checks the classes of the heads, of every loader and of the annotation files, and the file that the evaluator
    reads. Files that `CheckedCocoDataset` checked when it was built are not read again. Warns of a learning rate that
    belongs to a batch of another size.
    """

    def before_run(self, runner: Runner) -> None:
        """Checks the config, with the data of every loader that it trains or validates on."""
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
        """Checks the built model against the training data."""
        check_num_classes(runner.model, runner.train_dataloader.dataset.metainfo)
        scaling = runner.cfg.get("auto_scale_lr") or {}
        base, batch = scaling.get("base_batch_size"), get_world_size() * (runner.train_dataloader.batch_size or 0)
        if base and batch and not scaling.get("enable") and not base / 4 <= batch <= base * 4:
            print_log(
                f"the learning rate belongs to a batch of {base} images (auto_scale_lr.base_batch_size), and this "
                f"training has {batch}: train with --auto-scale-lr, or set optim_wrapper.optimizer.lr and the base",
                logger="current",
                level=logging.WARNING,
            )

    def before_val(self, runner: Runner) -> None:
        """Checks the built model against the validation data."""
        check_num_classes(runner.model, runner.val_dataloader.dataset.metainfo)

    def before_test(self, runner: Runner) -> None:
        """Checks the built model against the test data."""
        check_num_classes(runner.model, runner.test_dataloader.dataset.metainfo)


@HOOKS.register_module()
class DashboardHook(Hook):
    """Logs to TensorBoard or Weights & Biases as well, with validation pictures: ground truth left, boxes right.

    One setting for any config or command line, because mmengine lets no two base configs set the same field:
    `default_hooks = dict(dashboard=dict(type="castling_det.DashboardHook"))`, or
    `--cfg-options default_hooks.dashboard.type=castling_det.DashboardHook`.

    Every validation draws the same first images under the same names, with the iteration as step.

    Args:
        backend: `"tensorboard"` or `"wandb"`; its package must be installed.
        pictures: validation images to draw; 0 draws none.
        score: smallest score, in [0, 1], of a box that is drawn.
        init_kwargs: of `wandb.init`, such as `dict(project="trees", mode="offline")`; only for `"wandb"`.
    """

    # Before the hooks that log at the start of a run.
    priority = "VERY_HIGH"

    def __init__(
        self,
        *,
        backend: str = "tensorboard",
        pictures: int = 4,
        score: float = 0.3,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if backend not in _DASHBOARDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, _DASHBOARDS))}")
        if pictures < 0 or not 0 <= score <= 1:
            raise ValueError(f"pictures={pictures}, score={score}: expected a number >= 0 and a score in [0, 1]")
        if init_kwargs is not None and backend != "wandb":
            raise ValueError(f"init_kwargs={init_kwargs}: backend={backend!r} takes none; set backend='wandb'")
        if find_spec(backend) is None:
            raise ImportError(f"DashboardHook(backend={backend!r}): {backend} is not installed; pip install {backend}")
        self.backend = backend
        self.pictures = pictures
        self.score = score
        self.init_kwargs = init_kwargs
        self._drawn = 0

    def before_run(self, runner: Runner) -> None:
        """Adds the dashboard to the visualizer, unless the config did, and logs the config to it."""
        name = _DASHBOARDS[self.backend]
        # mmengine has no public way to add a backend to a visualizer that is built.
        backends = runner.visualizer._vis_backends
        if name in backends or not is_main_process():
            return
        options = {} if self.init_kwargs is None else {"init_kwargs": dict(self.init_kwargs)}
        backends[name] = VISBACKENDS.build(dict(type=name, save_dir=str(Path(runner.log_dir, "vis_data")), **options))
        backends[name].add_config(runner.cfg)

    def before_train(self, runner: Runner) -> None:
        """Logs validation scores by iteration in a run without epochs, where all of them would be of epoch 0."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            for hook in runner.hooks:
                if isinstance(hook, LoggerHook):
                    hook.log_metric_by_epoch = False

    def before_val_epoch(self, runner: Runner) -> None:
        """Begins with the first image again."""
        self._drawn = 0

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draws images until there are enough."""
        from mmcv import imread

        for sample in list(outputs or ())[: self.pictures - self._drawn] if is_main_process() else ():
            runner.visualizer.add_datasample(
                # Without a slash: mmengine's local backend takes it for a folder and then writes no picture.
                f"val_{self._drawn}",
                imread(sample.img_path, channel_order="rgb"),
                data_sample=sample,
                pred_score_thr=self.score,
                step=runner.iter,
            )
            self._drawn += 1

    def after_run(self, runner: Runner) -> None:
        """Writes the last events to the disk: TensorBoard's writer holds them back for minutes."""
        backend = runner.visualizer.get_backend(_DASHBOARDS[self.backend])
        if self.backend == "tensorboard" and backend is not None:
            backend.experiment.flush()


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a training that was interrupted and resumed end with the same weights as one that nobody disturbed.

    Without it a resumed run differs in three ways: the random generators (drop path) start anew, the workers of a
    loader have not drawn the random numbers (augmentation) that they had drawn, and a validation during which the run
    was killed is not repeated. With it, the generators follow from the seed and the iteration; on resuming an
    iteration-based loop the workers load again what they had loaded, and the validation that belongs to the
    checkpoint is repeated. An epoch-based loop begins each epoch with fresh workers.

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
            # mmengine logs a validation without its iteration: readers take it from the row before.
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
    """Makes workers load the batches that mmengine only counts when it skips them, so that they draw the same."""
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


class WholeFileBackend(LocalBackend):
    """mmengine's local files, but written to a temporary name, synced and renamed; removed by `remove_outdated`."""

    def __init__(self) -> None:
        super().__init__()
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes; at any time `filepath` is the old file or the whole new one."""
        with atomic_write(filepath) as temporary:
            temporary.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Writes text in the same way."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | Path) -> None:
        """Notes a file that is no longer needed."""
        self.outdated.append(str(filepath))

    def remove_outdated(self) -> None:
        """Removes the files that `remove` noted."""
        for path in self.outdated:
            Path(path).unlink(missing_ok=True)
        self.outdated.clear()


register_backend(_WHOLE, WholeFileBackend, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, with its arguments, in an order that a kill cannot harm.

    mmengine removes the old checkpoint before it writes the new one in place: killed in between, a run with
    `max_keep_ckpts=1` has nothing to resume from. Here the new one is written to a temporary name, synced and renamed,
    and old ones are removed last. Storage other than a local disk keeps its own backend.
    """

    # mmengine's, which has no types.
    file_backend: Any
    backend_args: dict[str, Any] | None

    def before_train(self, runner: Runner) -> None:
        """Chooses how files are written, and removes the temporary files of a run that was killed here."""
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend and self.backend_args is None:
            self.file_backend, self.backend_args = WholeFileBackend(), {"backend": _WHOLE}
            for part in Path(self.out_dir).glob(".*.pth.*.part") if is_main_process() else ():
                part.unlink(missing_ok=True)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Saves if it is time to."""
        super().after_train_iter(runner, *args, **kwargs)
        self._remove_outdated()

    def after_train_epoch(self, runner: Runner) -> None:
        """Saves if it is time to."""
        super().after_train_epoch(runner)
        self._remove_outdated()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Saves the best checkpoint if this validation is the best so far."""
        super().after_val_epoch(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        if isinstance(self.file_backend, WholeFileBackend):
            self.file_backend.remove_outdated()
