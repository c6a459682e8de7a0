"""The main job: softmax and castling trained alike, castling converted, all three evaluated and reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castling_det.experiments.steps import Step, mmdet_tool

__all__ = ["Comparison", "comparison_steps"]


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it goes.

    Configs are `PREFIX_{softmax,castling,deploy}_SUFFIX.py` in one folder, trained with the same seed, for
    `max_iters` iterations or what the configs say.
    """

    work_dir: Path
    configs: Path
    tools: Path
    prefix: str
    suffix: str
    train_annotations: Path
    annotations: Path
    """Of the images that the report is about."""
    images: Path
    max_iters: int | None = None
    seeds: Sequence[int] = (0,)

    def config(self, attention: str) -> Path:
        """The config of one attention."""
        return self.configs / f"{self.prefix}_{attention}_{self.suffix}.py"

    def folder(self, seed: int, name: str) -> Path:
        """The work dir of one run."""
        return self.work_dir / f"seed{seed}" / name

    def last_checkpoint(self) -> str:
        """The file name that mmengine gives the last checkpoint of a training."""
        from mmengine.config import Config

        train_cfg = Config.fromfile(self.config("softmax")).train_cfg
        if "max_epochs" in train_cfg and self.max_iters is None:
            return f"epoch_{train_cfg.max_epochs}.pth"
        return f"iter_{self.max_iters or train_cfg.max_iters}.pth"


def comparison_steps(plan: Comparison) -> list[Step]:
    """Every command in order; those of one seed follow each other."""
    steps = [step for seed in plan.seeds for step in _seed_steps(plan, seed)]
    runs = [
        f"{name}={plan.folder(seed, name)}" for seed in plan.seeds for name in ("softmax", "castling", "deploy")
    ]
    command = [
        *_python(plan.tools / "report.py"),
        *(part for run in runs for part in ("--run", run)),
        *("--baseline", "softmax", "--deployed", "deploy"),
        *("--ann", str(plan.annotations), "--images", str(plan.images)),
        *("--out", str(plan.work_dir / "report")),
    ]
    tested = tuple(step.stamp for step in steps if step.stamp_name == "test")
    return [*steps, Step("report", tuple(command), plan.work_dir / "report", inputs=tested)]


def _seed_steps(plan: Comparison, seed: int) -> list[Step]:
    softmax, castling, deploy = (plan.folder(seed, name) for name in ("softmax", "castling", "deploy"))
    weights = castling / plan.last_checkpoint()
    train_softmax, train_castling = (_train(plan, seed, name) for name in ("softmax", "castling"))
    convert = Step(
        f"seed {seed}: convert to linear attention",
        (
            *_python(plan.tools / "convert.py"),
            *map(str, (plan.config("castling"), weights, deploy / "deploy.pth")),
            *("--probe-images", str(plan.images)),
        ),
        deploy,
        inputs=(train_castling.stamp,),
        stamp_name="convert",
    )
    return [
        train_softmax,
        train_castling,
        convert,
        _test(plan, seed, "softmax", softmax / plan.last_checkpoint(), train_softmax),
        _test(plan, seed, "castling", weights, train_castling),
        _test(plan, seed, "deploy", deploy / "deploy.pth", convert),
    ]


def _train(plan: Comparison, seed: int, name: str) -> Step:
    folder = plan.folder(seed, name)
    return Step(
        f"seed {seed}: train {name}",
        (
            *_python(Path(mmdet_tool("train.py"))),
            *(str(plan.config(name)), "--work-dir", str(folder), "--resume"),
            *("--cfg-options", f"randomness.seed={seed}"),
            *((f"train_cfg.max_iters={plan.max_iters}",) if plan.max_iters is not None else ()),
        ),
        folder,
        inputs=(plan.train_annotations, plan.annotations),
        settings=_resolved(plan.config(name)),
        keep_partial=True,
        stamp_name="train",
    )


def _test(plan: Comparison, seed: int, name: str, checkpoint: Path, after: Step) -> Step:
    folder = plan.folder(seed, name) / "test"
    return Step(
        f"seed {seed}: test {name}",
        (
            *_python(Path(mmdet_tool("test.py"))),
            *(str(plan.config(name)), str(checkpoint), "--work-dir", str(folder)),
            *("--cfg-options", f"test_evaluator.outfile_prefix={folder / 'predictions'}"),
        ),
        folder,
        inputs=(after.stamp,),
        stamp_name="test",
    )


def _resolved(config: Path) -> str:
    """What the config says once its bases are read: a comment or another family's file changes nothing."""
    from mmengine.config import Config

    return json.dumps(Config.fromfile(config).to_dict(), sort_keys=True, default=str)


def _python(script: Path) -> tuple[str, str]:
    return sys.executable, str(script)
