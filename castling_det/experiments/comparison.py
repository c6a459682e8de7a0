"""The main job: softmax and castling trained alike, castling converted, all three evaluated and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castling_det.experiments.commands import python, report_step, test_step, train_step
from castling_det.experiments.steps import Step

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
    report = report_step(
        plan.tools / "report.py",
        [f"{name}={plan.folder(seed, name)}" for seed in plan.seeds for name in ("softmax", "castling", "deploy")],
        plan.work_dir / "report",
        baseline="softmax",
        deployed="deploy",
        annotations=plan.annotations,
        images=plan.images,
        after=steps,
    )
    return [*steps, report]


def _seed_steps(plan: Comparison, seed: int) -> list[Step]:
    softmax, castling, deploy = (plan.folder(seed, name) for name in ("softmax", "castling", "deploy"))
    weights = castling / plan.last_checkpoint()
    train_softmax, train_castling = (_train(plan, seed, name) for name in ("softmax", "castling"))
    convert = Step(
        f"seed {seed}: convert to linear attention",
        (
            *python(plan.tools / "convert.py"),
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
    return train_step(
        name,
        plan.config(name),
        plan.folder(seed, name),
        inputs=(plan.train_annotations, plan.annotations),
        seed=seed,
        options=() if plan.max_iters is None else (f"train_cfg.max_iters={plan.max_iters}",),
    )


def _test(plan: Comparison, seed: int, name: str, checkpoint: Path, after: Step) -> Step:
    return test_step(name, plan.config(name), checkpoint, plan.folder(seed, name), after=after, seed=seed)
