"""The study: every option of the attention by itself, trained alike, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from castling_det.experiments.commands import report_step, test_step, train_step
from castling_det.experiments.steps import Step

__all__ = ["Study", "Variant", "study_steps"]


@dataclass(frozen=True)
class Variant:
    """One row of a study: a config and what is set otherwise, in the form of MMDetection's `--cfg-options`."""

    attention: str
    """Which of a model's configs it starts from: `"softmax"`, `"linear"` or `"castling"`."""
    options: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    """What the row shows, for the reader."""


@dataclass(frozen=True)
class Study:
    """What is compared, and where it goes.

    Configs are `PREFIX_{softmax,linear,castling}_SUFFIX.py` in one folder. Hybrids are tested in eval mode, which is
    their deployed form: once the mask is empty, conversion changes no bit of it.
    """

    work_dir: Path
    configs: Path
    tools: Path
    prefix: str
    suffix: str
    variants: Mapping[str, Variant]
    baseline: str
    train_annotations: Path
    annotations: Path
    images: Path
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline={self.baseline!r}: expected a variant, one of {', '.join(self.variants)}")

    def config(self, variant: Variant) -> Path:
        """The config that a variant starts from."""
        return self.configs / f"{self.prefix}_{variant.attention}_{self.suffix}.py"

    def last_checkpoint(self, variant: Variant) -> str:
        """The file name that mmengine gives the last checkpoint of a training."""
        from mmengine.config import Config

        max_iters = variant.options.get("max_iters") or Config.fromfile(self.config(variant)).max_iters
        return f"iter_{max_iters}.pth"

    def folder(self, seed: int, name: str) -> Path:
        """The work dir of one run."""
        return self.work_dir / f"seed{seed}" / name


def study_steps(study: Study) -> list[Step]:
    """Every command in order, all variants of one seed before the next seed, the report last."""
    runs = [(seed, name) for seed in study.seeds for name in study.variants]
    steps = [step for seed, name in runs for step in _run_steps(study, seed, name)]
    report = report_step(
        study.tools / "report.py",
        [f"{name}={study.folder(seed, name)}" for seed, name in runs],
        study.work_dir / "report",
        baseline=study.baseline,
        deployed=list(study.variants)[-1],
        annotations=study.annotations,
        images=study.images,
        after=steps,
    )
    return [*steps, report]


def _run_steps(study: Study, seed: int, name: str) -> list[Step]:
    variant, folder = study.variants[name], study.folder(seed, name)
    config = study.config(variant)
    options = [f"{key}={value}" for key, value in variant.options.items()]
    inputs = (study.train_annotations, study.annotations)
    train = train_step(name, config, folder, inputs=inputs, seed=seed, options=options)
    checkpoint = folder / study.last_checkpoint(variant)
    of_model = [option for option in options if option.startswith("model.")]
    return [train, test_step(name, config, checkpoint, folder, after=train, seed=seed, options=of_model)]
