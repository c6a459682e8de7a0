"""The hook that shows a training in TensorBoard or Weights & Biases: every scalar, the mask's too, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import VISBACKENDS
from mmengine.runner import IterBasedTrainLoop, Runner

from castling_det.registry import HOOKS

__all__ = ["BACKENDS", "DashboardHook"]

BACKENDS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend"}
"""Name of a dashboard, which is that of its package too, and mmengine's class for it."""


@HOOKS.register_module()
class DashboardHook(Hook):
    """Adds a dashboard to what the config logs to, and shows it validation pictures: ground truth left, boxes right.

    One setting of any config or command line, since mmengine lets no two base configs set the same field:
    `default_hooks = dict(dashboard=dict(type="castling_det.DashboardHook"))`, or
    `--cfg-options default_hooks.dashboard.type=castling_det.DashboardHook`.

    The first images of every validation are drawn, the same ones each time under names of their own, with the
    iteration as step: a dashboard shows each of them over training.

    Args:
        backend: `"tensorboard"` or `"wandb"`; its package must be installed.
        pictures: validation images to draw; 0 draws none.
        score: smallest score, in [0, 1], of a box that is drawn.
        init_kwargs: of `wandb.init`, such as `dict(project="trees", mode="offline")`; for `"wandb"` alone.
    """

    # Before what logs at the start of a run.
    priority = "VERY_HIGH"

    def __init__(
        self,
        *,
        backend: str = "tensorboard",
        pictures: int = 4,
        score: float = 0.3,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")
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
        """Adds the dashboard to the visualizer, unless the config has it there already, and shows it the config."""
        name = BACKENDS[self.backend]
        # mmengine has no way to add a backend to a visualizer that stands.
        backends = runner.visualizer._vis_backends
        if name in backends or not is_main_process():
            return
        options = {"init_kwargs": dict(self.init_kwargs)} if self.init_kwargs is not None else {}
        folder = str(Path(runner.log_dir) / "vis_data")
        backends[name] = VISBACKENDS.build(dict(type=name, save_dir=folder, **options))
        backends[name].add_config(runner.cfg)

    def before_train(self, runner: Runner) -> None:
        """Lets validation scores be logged by iteration where there are no epochs: all of them would stand at 0."""
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
        """Draws until there are enough."""
        for sample in outputs or ():
            if self._drawn == self.pictures or not is_main_process():
                return
            self._draw(runner, sample)
            self._drawn += 1

    def after_run(self, runner: Runner) -> None:
        """Brings the last events to the disk: TensorBoard's writer holds them back for minutes."""
        backend = runner.visualizer.get_backend(BACKENDS[self.backend])
        if self.backend == "tensorboard" and backend is not None:
            backend.experiment.flush()

    def _draw(self, runner: Runner, sample: Any) -> None:
        from mmcv import imread

        runner.visualizer.add_datasample(
            # Without a slash: mmengine's local backend would look for a folder, and drop the picture without a word.
            f"val_{self._drawn}",
            imread(sample.img_path, channel_order="rgb"),
            data_sample=sample,
            pred_score_thr=self.score,
            step=runner.iter,
        )
