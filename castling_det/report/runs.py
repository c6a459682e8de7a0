"""One run of a report: where it lies, and its record. A run that cannot be read has a record that says why."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
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

_FIELDS = {"test": "test_dir", "train": "train_dir", "seed": "seed"} | {
    name: name for name in ("config", "checkpoint", "predictions")
}
_FORM = (
    f"NAME=PATH[,KEY=VALUE...], PATH a work dir, a checkpoint.pth or a predictions.json, KEY of {', '.join(_FIELDS)}"
)

_ROUNDING = 0.0015
"""mAP in [0, 1] by which a test's own figure, which has three digits, may differ from that of its predictions."""


@dataclass(frozen=True)
class RunSpec:
    """Where one run lies. What is None is found from the rest.

    `work_dir` is its training work dir, the folder of a checkpoint, or a test work dir; None for a run of which only
    predictions are at hand. `test_dir` was given to tools/test.py. `train_dir` holds the scalars of the training: if
    None, `work_dir`, or for a converted checkpoint the folder of its source. `predictions` is a COCO results file.
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
        """From `NAME=PATH[,KEY=VALUE...]`; ValueError for another form or an unknown key."""
        head, *rest = text.split(",")
        name, _, place = (part.strip() for part in head.partition("="))
        pairs = [(key, value) for key, _, value in (field.partition("=") for field in rest)]
        kind = {".pth": "checkpoint", ".json": "predictions"}.get(Path(place).suffix, "")
        pairs += [(kind, place)] if kind else []
        found = dict(pairs)
        if not (name and place and all(found.values()) and found.keys() <= _FIELDS.keys() and len(found) == len(pairs)):
            raise ValueError(f"--run {text!r}: expected {_FORM}, each once")
        if not re.fullmatch(r"[0-9]{1,18}", found.get("seed", "0")):
            raise ValueError(f"--run {text!r}: seed={found['seed']!r}: expected a whole number")
        work_dir = {"checkpoint": Path(place).parent, "predictions": None}.get(kind, Path(place))
        fields: dict[str, Any] = {
            _FIELDS[key]: int(value) if key == "seed" else Path(value) for key, value in found.items()
        }
        return cls(name, work_dir, **fields)


def build_run(spec: RunSpec, *, annotations: Annotations | None = None, latency: Latency | None = None) -> RunRecord:
    """Reads one run, and scores its predictions on `annotations`. A failed run's record has what could be read."""
    fields: dict[str, Any] = {"latency": latency, "seed": _seed(spec)}
    fields["work_dir"] = str(spec.work_dir) if spec.work_dir is not None else None
    if spec.work_dir is not None and not spec.work_dir.is_dir():
        return RunRecord(spec.name, reason=f"{spec.work_dir}: no such folder; train the run first", **fields)
    log, reasons = TrainingLog(), []
    try:
        if (found := config_of(spec)) is not None:
            path, config = found
            fields |= {"config": str(path), "attention": attention_of(config)}
            fields["seed"] = seed_of(config) if fields["seed"] is None else fields["seed"]
        checkpoint = _checkpoint(spec)
        if checkpoint is not None:
            fields |= {"checkpoint": str(checkpoint), "checkpoint_sha256": sha256_of(checkpoint)}
        log, fields["commands"] = _training(spec, checkpoint)
        fields |= _training_figures(log)
    except (ValueError, OSError) as error:
        reasons.append(str(error))
    try:
        fields |= _metrics(spec, log)
        fields |= _predicted(spec, annotations, fields)
    except (ValueError, OSError) as error:
        reasons.append(str(error))
    if not fields.get("metrics") and not reasons:
        reasons.append(f"{spec.predictions}: predictions need the annotations that they are scored on")
    losses = log.scalars.get("loss", Series())
    if losses.values and losses.values[-1] is None:
        reasons.append(f"the training loss is not finite at iteration {losses.steps[-1]}")
    return RunRecord(spec.name, reason=" | ".join(reasons) or None, **fields)


def final_loss(loss: Series) -> float | None:
    """The mean of the loss logged in the last quarter of a training; None where it is missing or not finite."""
    begin = 0.75 * max(loss.steps, default=0)
    values = [value for step, value in zip(loss.steps, loss.values, strict=True) if step > begin]
    finite = [value for value in values if value is not None]
    return statistics.mean(finite) if values and len(finite) == len(values) else None


def config_of(spec: RunSpec) -> tuple[Path, Any] | None:
    """The config with its path: the told one, else the test's, else the training's; ValueError if it is unreadable."""
    if spec.config is not None:
        return spec.config, load_config(spec.config)
    folders = (folder for folder in (spec.test, spec.work_dir) if folder is not None)
    return next((found for folder in folders if (found := read_dumped_config(folder)) is not None), None)


def classes_of(specs: Sequence[RunSpec]) -> tuple[str, ...] | None:
    """The classes that the first run with a config was tested on; None where no config names them."""
    config: Any = next((found[1] for spec in specs if (found := config_of(spec)) is not None), {})
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    classes = (dataset.get("metainfo") or {}).get("classes")
    return None if classes is None else (classes,) if isinstance(classes, str) else tuple(classes)


def _seed(spec: RunSpec) -> int | None:
    """The told one, or that of a folder such as `seed0` in the path."""
    place = (spec.work_dir or spec.predictions or Path()).as_posix()
    found = re.findall(r"(?:^|[/_-])seed[_-]?(\d{1,18})(?=$|[/_.-])", place)
    return spec.seed if spec.seed is not None or not found else int(found[-1])


def _checkpoint(spec: RunSpec) -> Path | None:
    """The file that was tested, if the test says so and it is still there; else the run's last one; else none."""
    if spec.checkpoint is not None or spec.work_dir is None:
        return spec.checkpoint
    dumped = read_dumped_config(spec.test) if spec.test is not None else None
    tested = Path(checkpoint_of(dumped[1]) or "") if dumped else Path()
    try:
        return tested if tested.is_file() else find_checkpoint(spec.work_dir)
    except ValueError:
        return None  # Weights are deleted to save space; the scores stay true.


def _training(spec: RunSpec, checkpoint: Path | None) -> tuple[TrainingLog, tuple[str, ...]]:
    """The log of the training and the run's commands; for a converted checkpoint, the log of its manifest's source."""
    folder = spec.train_dir or spec.work_dir
    if folder is None:
        return TrainingLog(), ()
    log = read_training_log(folder)
    source = source_of(checkpoint) if checkpoint is not None else None
    if spec.train_dir is None and not log.scalars and source is not None:
        folder = source.parent
        log = read_training_log(folder)
    places = [path for path in (folder, spec.work_dir, spec.test) if path is not None]
    return log, tuple(dict.fromkeys(line for path in places for line in read_commands(path)))


def _training_figures(log: TrainingLog) -> dict[str, Any]:
    loss, mask = log.scalars.get("loss", Series()), log.mask
    kept = ({name: series.thinned() for name, series in x.items()} for x in (mask.kept_fraction, mask.kept_mass))
    return {
        "loss": loss.thinned(),
        "final_loss": final_loss(loss),
        "validation": log.validation.get("mAP", Series()).thinned(),
        "mask": MaskOccupancy(mask.empty_from, *kept),
        "iterations": log.iterations,
        "train_seconds": log.seconds,
    }


def _metrics(spec: RunSpec, log: TrainingLog) -> dict[str, Any]:
    """The figures of the test; for a run that was never tested, those of its last validation."""
    if spec.test is None or (spec.predictions is not None and not metrics_files(spec.test)):
        return {}
    last = max((step for series in log.validation.values() for step in series.steps), default=None)
    if last is None or spec.test_dir is not None or spec.test.is_dir():
        return {"metrics": read_test_metrics(spec.test), "metrics_source": "tools/test.py"}
    metrics = {key: dict(zip(s.steps, s.values, strict=True)).get(last) for key, s in log.validation.items()}
    source = f"the validation at iteration {last}"
    note = f"figures of {source}; tools/test.py was not run"
    return {"metrics": metrics, "metrics_source": source, "notes": (note,)}


def _predicted(spec: RunSpec, annotations: Annotations | None, known: dict[str, Any]) -> dict[str, Any]:
    """Precision over recall, and the metrics of a run that has none.

    Predictions that do not give the metrics `known` from a test belong to another one: nothing is taken from them.
    """
    path = spec.predictions_file
    if path is None or annotations is None:
        return {}
    metrics, precision = evaluate_boxes(annotations.document, annotations.results(path))
    found = {"predictions": str(path), "precision": precision}
    if not known.get("metrics"):
        source = f"{path.name} by faster-coco-eval {version('faster-coco-eval')}"
        return {**found, "metrics": metrics, "metrics_source": source}
    recorded, ours = known["metrics"].get("mAP"), metrics["mAP"]
    if recorded is not None and ours is not None and abs(recorded - ours) <= _ROUNDING:
        return found
    given = "none" if ours is None else f"{ours:.4f}"
    note = f"{path} gives mAP {given} on {annotations.path}, but {known['metrics_source']} recorded {recorded}: "
    return {"notes": (*known.get("notes", ()), note + "not of the same test; left out of intervals and curves")}
