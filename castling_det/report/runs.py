"""One run of a report: where it lies, and its record. A run that cannot be read has a record that says why."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from castling_det.config import attention_of, checkpoint_of, load_config, seed_of
from castling_det.files import sha256_of
from castling_det.report.evaluation import Annotations, evaluate_boxes
from castling_det.report.records import Latency, MaskOccupancy, RunRecord, Series
from castling_det.report.work_dirs import (
    TrainingLog,
    find_checkpoint,
    metrics_files,
    read_commands,
    read_dumped_config,
    read_test_metrics,
    read_training_log,
    source_of,
)

_KEYS = ("test", "train", "config", "checkpoint", "predictions", "seed")
_FORM = f"NAME=PATH[,KEY=VALUE...], PATH a work dir, a checkpoint.pth or a predictions.json, KEY of {', '.join(_KEYS)}"

_ROUNDING = 0.0015
"""mAP in [0, 1] by which a test's own figure, which has three digits, may differ from that of its predictions."""


@dataclass(frozen=True)
class RunSpec:
    """Where one run lies. What is None is found from the rest.

    `work_dir` is its training work dir, the folder of a checkpoint, or a test work dir; None for a run of which only
    predictions are at hand. `test_dir` is the one that tools/test.py was given. `train_dir` holds the scalars of the
    training: if None, `work_dir`, or for a converted checkpoint the folder of the one that its manifest names.
    `config`, `checkpoint` and `seed` are read from what the tools dumped. `predictions` is a COCO results file.
    """

    name: str
    work_dir: Path | None
    test_dir: Path | None = None
    train_dir: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    seed: int | None = None
    predictions: Path | None = None

    @property
    def test(self) -> Path | None:
        """The test work dir: the told one, `work_dir/test`, or `work_dir` if the test, as by default, wrote there."""
        if self.test_dir is not None or self.work_dir is None:
            return self.test_dir
        inside = self.work_dir / "test"
        return self.work_dir if not inside.is_dir() and metrics_files(self.work_dir) else inside

    @property
    def predictions_file(self) -> Path | None:
        """The results file: the told one, or the one in the test work dir; None if there is none or are several."""
        if self.predictions is not None or self.test is None:
            return self.predictions
        usual = self.test / "predictions.bbox.json"
        found = [usual] if usual.is_file() else sorted(self.test.glob("*.bbox.json"))
        return found[0] if len(found) == 1 else None

    @classmethod
    def parse(cls, text: str) -> RunSpec:
        """From `NAME=PATH[,KEY=VALUE...]`.

        Raises:
            ValueError: not of that form, or an unknown key.
        """
        head, *rest = text.split(",")
        name, _, place = (part.strip() for part in head.partition("="))
        pairs = [(key, value) for key, _, value in (field.partition("=") for field in rest)]
        kind = {".pth": "checkpoint", ".json": "predictions"}.get(Path(place).suffix, "")
        pairs += [(kind, place)] if kind else []
        found = dict(pairs)
        if not (name and place and all(found.values()) and found.keys() <= set(_KEYS) and len(found) == len(pairs)):
            raise ValueError(f"--run {text!r}: expected {_FORM}, each once")
        seed = found.pop("seed", "0")
        if not re.fullmatch(r"[0-9]{1,18}", seed):
            raise ValueError(f"--run {text!r}: seed={seed!r}: expected a whole number")
        fields = {{"test": "test_dir", "train": "train_dir"}.get(key, key): Path(value) for key, value in found.items()}
        work_dir = {"checkpoint": Path(place).parent, "predictions": None}.get(kind, Path(place))
        return cls(name, work_dir, seed=int(seed) if "seed" in dict(pairs) else None, **fields)


def build_run(
    spec: RunSpec,
    *,
    annotations: Annotations | None = None,
    shape: tuple[int, int] | None = None,
    counted: dict[str, Any] | None = None,
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
    record = RunRecord(spec.name, work_dir=work_dir, latency=latency, seed=_seed(spec))
    if spec.work_dir is not None and not spec.work_dir.is_dir():
        return replace(record, reason=f"{spec.work_dir}: no such folder; train the run first")
    log, reasons = TrainingLog(), []
    try:
        record = _with_config(record, spec)
        record = _with_checkpoint(record, spec)
        log, commands = _training(record, spec)
        record = _with_training(record, log, commands)
    except (ValueError, OSError) as error:
        reasons.append(str(error))
    try:
        record = _with_metrics(record, spec, log)
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
    losses = log.scalars.get("loss", Series())
    if losses.values and losses.values[-1] is None:
        reasons.append(f"the training loss is not finite at iteration {losses.steps[-1]}")
    return replace(record, reason=" | ".join(reasons) or None)


def final_loss(loss: Series) -> float | None:
    """The mean of the loss logged in the last quarter of a training; None where it is missing or not finite."""
    begin = 0.75 * max(loss.steps, default=0)
    values = [value for step, value in zip(loss.steps, loss.values, strict=True) if step > begin]
    finite = [value for value in values if value is not None]
    return statistics.mean(finite) if values and len(finite) == len(values) else None


def config_of(spec: RunSpec) -> tuple[Path, Any] | None:
    """The config of a run with its path: the told one, else that of the test, else of the training, else None.

    Raises:
        ValueError: it cannot be read; names it.
    """
    if spec.config is not None:
        return spec.config, load_config(spec.config)
    folders = (folder for folder in (spec.test, spec.work_dir) if folder is not None)
    return next((found for folder in folders if (found := read_dumped_config(folder)) is not None), None)


def _seed(spec: RunSpec) -> int | None:
    """The told one, or that of a folder such as `seed0` in the path."""
    place = (spec.work_dir or spec.predictions or Path()).as_posix()
    found = re.findall(r"(?:^|[/_-])seed[_-]?(\d{1,18})(?=$|[/_.-])", place)
    return spec.seed if spec.seed is not None or not found else int(found[-1])


def _with_config(record: RunRecord, spec: RunSpec) -> RunRecord:
    found = config_of(spec)
    if found is None:
        return record
    path, config = found
    seed = record.seed if record.seed is not None else seed_of(config)
    return replace(record, config=str(path), attention=attention_of(config), seed=seed)


def _with_checkpoint(record: RunRecord, spec: RunSpec) -> RunRecord:
    """The file that was tested, if the test says so and it is still there; else the run's last one; else none."""
    path = spec.checkpoint
    if path is None and spec.work_dir is not None:
        dumped = read_dumped_config(spec.test) if spec.test is not None else None
        tested = Path(checkpoint_of(dumped[1]) or "") if dumped else Path()
        try:
            path = tested if tested.is_file() else find_checkpoint(spec.work_dir)
        except ValueError:
            # Weights are deleted to save space; what the run scored stays true.
            return record
    return replace(record, checkpoint=str(path), checkpoint_sha256=sha256_of(path)) if path is not None else record


def _training(record: RunRecord, spec: RunSpec) -> tuple[TrainingLog, tuple[str, ...]]:
    """The log of the training and the run's commands; of a converted checkpoint, the log of its manifest's source."""
    folder = spec.train_dir or spec.work_dir
    if folder is None:
        return TrainingLog(), ()
    log = read_training_log(folder)
    source = source_of(Path(record.checkpoint)) if record.checkpoint is not None else None
    if spec.train_dir is None and not log.scalars and source is not None:
        folder = source.parent
        log = read_training_log(folder)
    places = [path for path in (folder, spec.work_dir, spec.test) if path is not None]
    return log, tuple(dict.fromkeys(line for path in places for line in read_commands(path)))


def _with_training(record: RunRecord, log: TrainingLog, commands: tuple[str, ...]) -> RunRecord:
    loss, mask = log.scalars.get("loss", Series()), log.mask
    fraction = {name: series.thinned() for name, series in mask.kept_fraction.items()}
    mass = {name: series.thinned() for name, series in mask.kept_mass.items()}
    return replace(
        record,
        loss=loss.thinned(),
        final_loss=final_loss(loss),
        validation=log.validation.get("mAP", Series()).thinned(),
        mask=MaskOccupancy(mask.empty_from, fraction, mass),
        iterations=log.iterations,
        train_seconds=log.seconds,
        commands=commands,
    )


def _with_metrics(record: RunRecord, spec: RunSpec, log: TrainingLog) -> RunRecord:
    """What the test recorded; of a run that was never tested, what its last validation scored."""
    if spec.test is None:
        return record
    last = max((step for series in log.validation.values() for step in series.steps), default=None)
    if spec.test_dir is None and spec.predictions is None and last is not None and not spec.test.is_dir():
        found = {key: dict(zip(s.steps, s.values, strict=True)).get(last) for key, s in log.validation.items()}
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


def _with_complexity(record: RunRecord, shape: tuple[int, int], counted: dict[str, Any]) -> RunRecord:
    """Counts once for each model section: seeds of a run share it."""
    from castling_det.report.complexity import detector_complexity

    assert record.config is not None
    config = load_config(record.config)
    key = repr(config.model)
    if key not in counted:
        counted[key] = detector_complexity(config, shape, name=record.config)
    found = counted[key]
    by_kind = {kind: macs / 1e9 for kind, macs in found.macs_by_kind.items()}
    return replace(record, params=found.params, gmacs=found.gmacs, gmacs_by_kind=by_kind, input_shape=found.input_shape)


def _noted(record: RunRecord, note: str) -> RunRecord:
    return replace(record, notes=(*record.notes, note))
