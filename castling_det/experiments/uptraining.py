"""Trained softmax detectors become linear ones by a short castling training: start, train, convert, test, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castling_det.experiments.commands import python, report_step, test_step
from castling_det.experiments.steps import Step, mmdet_tool

__all__ = ["Uptraining", "uptraining_steps"]

BASELINE = "softmax"
DEPLOYED = "uptrained"


@dataclass(frozen=True)
class Uptraining:
    """What is uptrained, and where it goes.

    Configs are `PREFIX_softmax_SUFFIX.py` of the teachers and `PREFIX_{castling,deploy}-from-softmax_SUFFIX.py`, with
    `castling-from-softmax-distilled` beside them, in one folder.
    """

    work_dir: Path
    configs: Path
    tools: Path
    prefix: str
    suffix: str
    teachers: str
    """Work dir of the softmax training of a seed, such as `work_dirs/study/seed{seed}/softmax`; tested in `test/`."""
    annotations: Path
    """Of the images that the report is about."""
    images: Path
    distill: bool = False
    max_iters: int | None = None
    """Instead of the config's."""
    options: Sequence[str] = ()
    """Further `key=value` for the training."""
    seeds: Sequence[int] = (0,)

    def config(self, name: str) -> Path:
        """The config of one part."""
        return self.configs / f"{self.prefix}_{name}_{self.suffix}.py"

    def teacher(self, seed: int) -> Path:
        """The work dir of a seed's softmax training."""
        return Path(self.teachers.format(seed=seed))

    def iterations(self) -> int:
        """Of the castling training."""
        from mmengine.config import Config

        return int(self.max_iters or Config.fromfile(self.config("castling-from-softmax")).train_cfg.max_iters)


def uptraining_steps(plan: Uptraining) -> list[Step]:
    """Every command in order; those of one seed follow each other.

    Raises:
        ValueError: a teacher's checkpoint or its test is missing; says how to get it.
    """
    steps = [step for seed in plan.seeds for step in _seed_steps(plan, seed)]
    runs = [
        f"{name}={folder}"
        for seed in plan.seeds
        for name, folder in ((BASELINE, plan.teacher(seed)), (DEPLOYED, plan.work_dir / f"seed{seed}" / "deploy"))
    ]
    report = report_step(
        plan.tools / "report.py",
        runs,
        plan.work_dir / "report",
        baseline=BASELINE,
        deployed=DEPLOYED,
        annotations=plan.annotations,
        images=plan.images,
        after=steps,
    )
    return [*steps, report]


def _seed_steps(plan: Uptraining, seed: int) -> list[Step]:
    from castling_det.report.work_dirs import find_checkpoint, read_test_metrics

    teacher = find_checkpoint(plan.teacher(seed))
    read_test_metrics(plan.teacher(seed) / "test")
    folder = plan.work_dir / f"seed{seed}"
    training = plan.config("castling-from-softmax" + ("-distilled" if plan.distill else ""))
    start = Step(
        f"seed {seed}: start from softmax",
        (
            *(*python(plan.tools / "convert.py"), "--from-softmax"),
            *map(str, (training, teacher, folder / "start" / "start.pth")),
            *("--probe-images", str(plan.images)),
        ),
        folder / "start",
        inputs=(teacher, training),
        stamp_name="start",
    )
    train = Step(
        f"seed {seed}: train castling",
        (
            # Not --resume: mmengine would go on from `load_from` as if it were this training's.
            *(*python(Path(mmdet_tool("train.py"))), str(training), "--work-dir", str(folder / "castling")),
            *("--cfg-options", f"randomness.seed={seed}", f"load_from={folder / 'start' / 'start.pth'}"),
            *((f"model.distillation.checkpoint={teacher}",) if plan.distill else ()),
            *((f"train_cfg.max_iters={plan.max_iters}",) if plan.max_iters is not None else ()),
            *plan.options,
        ),
        folder / "castling",
        inputs=(start.stamp, plan.annotations),
        stamp_name="train",
    )
    weights = folder / "castling" / f"iter_{plan.iterations()}.pth"
    convert = Step(
        f"seed {seed}: convert to linear attention",
        (
            *python(plan.tools / "convert.py"),
            *map(str, (training, weights, folder / "deploy" / "deploy.pth")),
            *("--probe-images", str(plan.images)),
        ),
        folder / "deploy",
        inputs=(train.stamp,),
        stamp_name="convert",
    )
    deploy = plan.config("deploy-from-softmax")
    test = test_step(DEPLOYED, deploy, folder / "deploy" / "deploy.pth", folder / "deploy", after=convert, seed=seed)
    return [start, train, convert, test]
