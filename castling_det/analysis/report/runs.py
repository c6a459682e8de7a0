"""From one run's work dirs to its record. What cannot be read makes it a record that says failed and why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from castling_det.analysis.complexity import Complexity, detector_complexity
from castling_det.analysis.configs import attention_of, checkpoint_of, load_config, seed_of
from castling_det.analysis.record import Latency, RunRecord
from castling_det.analysis.report.spec import RunSpec
from castling_det.analysis.scalars import read_training_log
from castling_det.analysis.work_dir import (
    find_checkpoint,
    read_commands,
    read_dumped_config,
    read_test_metrics,
    source_of,
)
from castling_det.files import sha256_of

__all__ = ["build_run", "config_of"]


def build_run(
    spec: RunSpec,
    *,
    shape: tuple[int, int] | None = None,
    counted: dict[str, Complexity] | None = None,
    latency: Latency | None = None,
) -> RunRecord:
    """Reads one run. What can be read is in the record even if the run failed."""
    record = RunRecord(spec.name, "ok", work_dir=str(spec.work_dir), latency=latency, seed=_seed(spec))
    steps = (_with_config, _with_checkpoint, _with_training, _with_metrics)
    reasons = []
    if not spec.work_dir.is_dir():
        return replace(record, status="failed", reason=f"{spec.work_dir}: no such folder; train the run first")
    for step in steps:
        try:
            record = step(record, spec)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    if shape is not None and record.config is not None:
        try:
            record = _with_complexity(record, shape, counted if counted is not None else {})
        except ValueError as error:
            # What it scored stays true.
            record = replace(record, notes=(f"parameters and multiply-adds are not known: {error}",))
    losses = record.scalars.get("loss")
    if losses is not None and losses.values[-1] is None:
        reasons.append(f"the training loss is not finite at iteration {losses.steps[-1]}")
    return replace(record, status="failed", reason=" | ".join(reasons)) if reasons else record


def _seed(spec: RunSpec) -> int | None:
    if spec.seed is not None:
        return spec.seed
    found = re.findall(r"(?:^|[/_-])seed[_-]?(\d+)(?=$|[/_.-])", spec.work_dir.as_posix())
    return int(found[-1]) if found else None


def config_of(spec: RunSpec) -> tuple[Path, Any] | None:
    """The config of a run with its path: the told one, else that of the test, else of the training, else None.

    Raises:
        ValueError: it cannot be read; names it.
    """
    if spec.config is not None:
        return spec.config, load_config(spec.config)
    return read_dumped_config(spec.test) or read_dumped_config(spec.work_dir)


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
    log = read_training_log(folder)
    source = source_of(Path(record.checkpoint)) if record.checkpoint is not None else None
    if spec.train_dir is None and not log.scalars and source is not None:
        folder = source.parent
        log = read_training_log(folder)
    commands = dict.fromkeys(line for path in (folder, spec.work_dir, spec.test) for line in read_commands(path))
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
        dumped = read_dumped_config(spec.test)
        tested = checkpoint_of(dumped[1]) if dumped else None
        try:
            path = Path(tested) if tested and Path(tested).is_file() else find_checkpoint(spec.work_dir)
        except ValueError:
            # Weights are deleted to save space; what the run scored stays true.
            return record
    return replace(record, checkpoint=str(path), checkpoint_sha256=sha256_of(path))


def _with_metrics(record: RunRecord, spec: RunSpec) -> RunRecord:
    return replace(record, metrics=read_test_metrics(spec.test))


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
