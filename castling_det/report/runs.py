"""From one run's work dirs to its record. What cannot be read makes it a record that says failed and why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from castling_det.config import attention_of, checkpoint_of, load_config, seed_of
from castling_det.files import sha256_of
from castling_det.report.compare import Annotations
from castling_det.report.complexity import Complexity, detector_complexity
from castling_det.report.evaluation import evaluate_boxes
from castling_det.report.record import Latency, RunRecord
from castling_det.report.scalars import read_training_log
from castling_det.report.spec import RunSpec
from castling_det.report.work_dir import (
    find_checkpoint,
    metrics_files,
    read_commands,
    read_dumped_config,
    read_test_metrics,
    source_of,
)

__all__ = ["build_run", "config_of"]

_ROUNDING = 0.0015
"""mAP in [0, 1] by which a test's own figure, which has three digits, may differ from that of its predictions."""


def build_run(
    spec: RunSpec,
    *,
    annotations: Annotations | None = None,
    shape: tuple[int, int] | None = None,
    counted: dict[str, Complexity] | None = None,
    latency: Latency | None = None,
) -> RunRecord:
    """Reads one run. What can be read is in the record even if the run failed.

    Args:
        spec: where it lies.
        annotations: of the images that it was tested on: predictions are evaluated on them.
        shape: height and width at which multiply-adds are counted; None leaves them out.
        counted: what was counted before, by model; grows.
        latency: measured elsewhere.
    """
    work_dir = str(spec.work_dir) if spec.work_dir is not None else None
    record = RunRecord(spec.name, "ok", work_dir=work_dir, latency=latency, seed=_seed(spec))
    if spec.work_dir is not None and not spec.work_dir.is_dir():
        return replace(record, status="failed", reason=f"{spec.work_dir}: no such folder; train the run first")
    reasons = []
    for step in (_with_config, _with_checkpoint, _with_training, _with_metrics):
        try:
            record = step(record, spec)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    try:
        record = _with_predictions(record, spec, annotations)
    except (ValueError, OSError) as error:
        reasons.append(str(error))
    if not record.metrics and not reasons:
        reasons.append(f"{spec.predictions}: predictions need the annotations that they are scored on")
    if shape is not None and record.config is not None:
        try:
            record = _with_complexity(record, shape, counted if counted is not None else {})
        except ValueError as error:
            # What it scored stays true.
            record = _noted(record, f"parameters and multiply-adds are not known: {error}")
    losses = record.scalars.get("loss")
    if losses is not None and losses.values[-1] is None:
        reasons.append(f"the training loss is not finite at iteration {losses.steps[-1]}")
    return replace(record, status="failed", reason=" | ".join(reasons)) if reasons else record


def _seed(spec: RunSpec) -> int | None:
    if spec.seed is not None:
        return spec.seed
    place = spec.work_dir or spec.predictions or Path()
    found = re.findall(r"(?:^|[/_-])seed[_-]?(\d+)(?=$|[/_.-])", place.as_posix())
    return int(found[-1]) if found else None


def config_of(spec: RunSpec) -> tuple[Path, Any] | None:
    """The config of a run with its path: the told one, else that of the test, else of the training, else None.

    Raises:
        ValueError: it cannot be read; names it.
    """
    if spec.config is not None:
        return spec.config, load_config(spec.config)
    folders = (folder for folder in (spec.test, spec.work_dir) if folder is not None)
    return next((found for folder in folders if (found := read_dumped_config(folder)) is not None), None)


def _with_config(record: RunRecord, spec: RunSpec) -> RunRecord:
    found = config_of(spec)
    if found is None:
        return record
    path, config = found
    seed = record.seed if record.seed is not None else seed_of(config)
    return replace(record, config=str(path), attention=attention_of(config), seed=seed)


def _with_training(record: RunRecord, spec: RunSpec) -> RunRecord:
    """The scalars of the training; of a converted checkpoint, those of the one that its manifest names."""
    folder = spec.train_dir or spec.work_dir
    if folder is None:
        return record
    log = read_training_log(folder)
    source = source_of(Path(record.checkpoint)) if record.checkpoint is not None else None
    if spec.train_dir is None and not log.scalars and source is not None:
        folder = source.parent
        log = read_training_log(folder)
    places = [path for path in (folder, spec.work_dir, spec.test) if path is not None]
    commands = dict.fromkeys(line for path in places for line in read_commands(path))
    return replace(
        record,
        scalars=log.scalars,
        validation=log.validation,
        mask=log.mask,
        iterations=log.iterations,
        train_seconds=log.seconds,
        commands=tuple(commands),
    )


def _with_checkpoint(record: RunRecord, spec: RunSpec) -> RunRecord:
    """The file that was tested, if the test says so and it is still there; else the run's last one; else none."""
    path = spec.checkpoint
    if path is None:
        if spec.work_dir is None:
            return record
        dumped = read_dumped_config(spec.test) if spec.test is not None else None
        tested = checkpoint_of(dumped[1]) if dumped else None
        try:
            path = Path(tested) if tested and Path(tested).is_file() else find_checkpoint(spec.work_dir)
        except ValueError:
            # Weights are deleted to save space; what the run scored stays true.
            return record
    return replace(record, checkpoint=str(path), checkpoint_sha256=sha256_of(path))


def _with_metrics(record: RunRecord, spec: RunSpec) -> RunRecord:
    """What the test recorded; of a run that was never tested, what its last validation scored."""
    if spec.test is None:
        return record
    last = max((step for series in record.validation.values() for step in series.steps), default=None)
    if spec.test_dir is None and spec.predictions is None and last is not None and not spec.test.is_dir():
        found = {key: dict(zip(s.steps, s.values, strict=True)).get(last) for key, s in record.validation.items()}
        source = f"the validation at iteration {last}"
        scored = replace(record, metrics=found, metrics_source=source)
        return _noted(scored, f"figures of {source}; tools/test.py was not run")
    if spec.predictions is not None and not metrics_files(spec.test):
        return record
    return replace(record, metrics=read_test_metrics(spec.test), metrics_source="tools/test.py")


def _with_predictions(record: RunRecord, spec: RunSpec, annotations: Annotations | None) -> RunRecord:
    """Precision over recall, and the figures of a run that has no recorded ones.

    Predictions that do not give the recorded mAP are of something else: nothing is taken from them.
    """
    path = spec.predictions_file
    if path is None or annotations is None:
        return record
    evaluation = evaluate_boxes(annotations.document, annotations.results(path))
    recorded, ours = record.metrics.get("mAP"), evaluation.metrics["mAP"]
    if not record.metrics:
        record = replace(record, metrics=evaluation.metrics, metrics_source=f"{path.name} by {evaluation.backend}")
    elif recorded is None or ours is None or abs(recorded - ours) > _ROUNDING:
        given = "none" if ours is None else f"{ours:.4f}"
        return _noted(
            record, f"{path} gives mAP {given} on {annotations.path}, but {record.metrics_source} recorded {recorded}: "
            "not of the same test; left out of intervals and curves"
        )  # fmt: skip
    return replace(record, precision=evaluation.precision)


def _with_complexity(record: RunRecord, shape: tuple[int, int], counted: dict[str, Complexity]) -> RunRecord:
    """Counts once for each model section: seeds of a run share it."""
    assert record.config is not None
    config = load_config(record.config)
    key = repr(config.model)
    if key not in counted:
        counted[key] = detector_complexity(config, shape, name=record.config)
    complexity = counted[key]
    return replace(
        record,
        params=complexity.params,
        gmacs=complexity.gmacs,
        gmacs_by_kind={kind: macs / 1e9 for kind, macs in complexity.macs_by_kind.items()},
        input_shape=complexity.input_shape,
    )


def _noted(record: RunRecord, note: str) -> RunRecord:
    return replace(record, notes=(*record.notes, note))
