"""The commands that experiments are made of: MMDetection's train and test tools, and our report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from castling_det.experiments.steps import Step, mmdet_tool

__all__ = ["python", "report_step", "test_step", "train_step"]


def python(script: Path) -> tuple[str, str]:
    """The beginning of a command that runs `script` with this interpreter."""
    return sys.executable, str(script)


def train_step(
    name: str, config: Path, folder: Path, *, inputs: Sequence[Path], seed: int, options: Iterable[str] = ()
) -> Step:
    """Trains `config` into `folder`, or goes on there; `options` are of the form `key=value`."""
    return Step(
        f"seed {seed}: train {name}",
        (
            *python(Path(mmdet_tool("train.py"))),
            *(str(config), "--work-dir", str(folder), "--resume"),
            *("--cfg-options", f"randomness.seed={seed}", *options),
        ),
        folder,
        inputs=tuple(inputs),
        settings=_resolved(config),
        keep_partial=True,
        stamp_name="train",
    )


def test_step(
    name: str, config: Path, checkpoint: Path, folder: Path, *, after: Step, seed: int, options: Iterable[str] = ()
) -> Step:
    """Evaluates `checkpoint`, which `after` leaves, into `folder/test`."""
    folder = folder / "test"
    return Step(
        f"seed {seed}: test {name}",
        (
            *python(Path(mmdet_tool("test.py"))),
            *(str(config), str(checkpoint), "--work-dir", str(folder)),
            *("--cfg-options", f"test_evaluator.outfile_prefix={folder / 'predictions'}", *options),
        ),
        folder,
        inputs=(after.stamp,),
        stamp_name="test",
    )


def report_step(
    tool: Path,
    runs: Iterable[str],
    folder: Path,
    *,
    baseline: str,
    deployed: str,
    annotations: Path,
    images: Path,
    after: Iterable[Step],
) -> Step:
    """Compares `runs`, each `NAME=WORK_DIR`, which the tests among `after` evaluated."""
    command = (
        *python(tool),
        *(part for run in runs for part in ("--run", run)),
        *("--baseline", baseline, "--deployed", deployed),
        *("--ann", str(annotations), "--images", str(images)),
        *("--out", str(folder)),
    )
    return Step("report", command, folder, inputs=tuple(step.stamp for step in after if step.stamp_name == "test"))


def _resolved(config: Path) -> str:
    """What the config says once its bases are read: a comment or another family's file changes nothing.

    Nor do the hooks that only keep an interrupted training whole: what was trained without them stays done.
    """
    from mmengine.config import Config

    content = Config.fromfile(config).to_dict()
    hooks = content.get("default_hooks", {})
    hooks.pop("exact_resume", None)
    if hooks.get("checkpoint", {}).get("type") == "castling_det.WholeCheckpointHook":
        hooks["checkpoint"]["type"] = "CheckpointHook"
    return json.dumps(content, sort_keys=True, default=str)
