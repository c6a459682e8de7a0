"""What MMDetection's train and test tools leave in their work dirs: scalars, configs, checkpoints, metrics.

mmengine writes scalars to `<time>/vis_data/scalars.json`, one session a folder. Rows of the training loop carry `iter`;
rows of other hooks only `step`; rows of validation carry metrics, and as `step` the epoch when the loop counts epochs.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from castling_det.config import load_config
from castling_det.report.records import METRICS, MaskOccupancy, Series, read_json

Row = dict[str, float | None]
Table = dict[int, Row]
"""Rows by training iteration."""

_TEST_COMMAND = "tools/test.py CONFIG CHECKPOINT --work-dir"
_EPOCH_LENGTH = re.compile(r"Epoch\(train\)\s*\[\s*\d+\]\[\s*\d+/(\d+)\]")
_COUNTERS = frozenset({"step", "iter", "epoch"})
_MASK = re.compile(r"^(?:train/)?mask/")
_COCO_KEYS = {f"bbox_{name}".replace("mAP5", "mAP_5").replace("mAP7", "mAP_7"): name for name in METRICS}


@dataclass(frozen=True)
class TrainingLog:
    """What a training run logged, over its iterations. `seconds` is the time of the iterations without validation."""

    scalars: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    mask: MaskOccupancy = field(default_factory=MaskOccupancy)
    iterations: int | None = None
    seconds: float | None = None


def coco_metrics(row: dict[str, Any]) -> Row:
    """COCO's box metrics in a row, whatever their prefix. COCO's -1, for a size without annotations, is None here."""
    named = {_COCO_KEYS.get(key.rpartition("/")[2]): value for key, value in row.items() if _is_number(value)}
    return {name: _finite(value) if value >= 0 else None for name, value in named.items() if name is not None}


def read_training_log(work_dir: Path) -> TrainingLog:
    """Reads all sessions of a training work dir; empty if it holds none.

    Rows that a session logged beyond the point at which a later one resumed are dropped. ValueError names a line that
    is no JSON, other than a last one that a kill cut short.
    """
    train, val, mask = (Table(), Table(), Table())
    epoch_length = None
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        epoch_length = _epoch_length(path.parents[1]) or epoch_length
        session = _session(path, epoch_length)
        begins = min((step for table in session for step in table), default=math.inf)
        # A resumed session may begin with the validation of the checkpoint, which is of the last kept step.
        train, val, mask = (
            {step: row for step, row in old.items() if step <= begins} | new
            for old, new in zip((train, val, mask), session, strict=True)
        )
    scalars, kept = _series(train), _series(mask)
    fraction, mass = (_layers(kept, quantity) for quantity in ("kept_fraction/", "kept_mass/"))
    iterations = _iterations(work_dir, epoch_length, max(train)) if train else None
    times = [value for value in scalars.get("time", Series()).values if value is not None]
    seconds = statistics.mean(times) * iterations if times and iterations else None
    occupancy = MaskOccupancy(_empty_from(fraction), fraction, mass)
    return TrainingLog(scalars, _series(val), occupancy, iterations, seconds)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)  # mmengine writes NaN, which msgspec refuses
            if not isinstance(row, dict) or not all(_is_number(row[key]) for key in _COUNTERS & row.keys()):
                raise ValueError("not an object with numbers as step, iter and epoch")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            text = f"not a JSON object ({error}): damaged; remove the line, or train again"
            raise ValueError(f"{path}, line {number}: {text}") from error
        yield row


def _session(path: Path, epoch_length: int | None) -> tuple[Table, Table, Table]:
    """The rows of training, validation and mask of one session."""
    train, val, mask = Table(), Table(), Table()
    last, epoch = 0, None
    for row in _rows(path):
        if metrics := coco_metrics(row):
            step = int(row.get("step", 0))
            if epoch is not None and step == epoch:
                step = step * epoch_length if epoch_length is not None else last
            # A loop that counts iterations writes them here, or 0 where its logger counts epochs.
            val[max(last, step)] = metrics
            continue
        step = int(row.get("iter", row.get("step", 0)))
        numbers = {key: _finite(value) for key, value in row.items() if _is_number(value) and key not in _COUNTERS}
        kept = {_MASK.sub("", key): numbers.pop(key) for key in list(numbers) if _MASK.match(key)}
        if kept:
            mask.setdefault(step, {}).update(kept)
        if "iter" in row:
            last, epoch = step, row.get("epoch")
            if numbers:  # ExactResumeHook notes where it resumes, and nothing else
                train[step] = numbers
    return train, val, mask


def _series(table: Table) -> dict[str, Series]:
    keys = dict.fromkeys(key for row in table.values() for key in row)
    steps = {key: tuple(step for step in sorted(table) if key in table[step]) for key in keys}
    return {key: Series(steps[key], tuple(table[step][key] for step in steps[key])) for key in keys}


def _layers(series: dict[str, Series], prefix: str) -> dict[str, Series]:
    named = {key.removeprefix(prefix): value for key, value in series.items() if key.startswith(prefix)}
    return dict(sorted(named.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def _empty_from(layers: dict[str, Series]) -> int | None:
    """The first logged iteration from which on no layer kept anything; a value that is not finite proves nothing."""
    logged = [pair for series in layers.values() for pair in zip(series.steps, series.values, strict=True)]
    last_kept = max((step for step, value in logged if value is None or value > 0), default=-1)
    return min((step for step, _ in logged if step > last_kept), default=None)


def _epoch_length(session: Path) -> int | None:
    """Iterations an epoch, as the session's log says; None for a loop that counts iterations, or without a log."""
    logs = (path.read_text(encoding="utf-8", errors="replace") for path in session.glob("*.log"))
    return next((int(found[1]) for log in logs if (found := _EPOCH_LENGTH.search(log))), None)


def _iterations(work_dir: Path, epoch_length: int | None, last_logged: int) -> int:
    """Up to the last checkpoint, or the last logged iteration if that is later."""
    found = re.fullmatch(r"(epoch|iter)_(\d+)\.pth", _pointer(work_dir) or "")
    if found is None:
        return last_logged
    return max(last_logged, int(found[2]) * (1 if found[1] == "iter" else epoch_length or 0))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def read_test_metrics(test_dir: Path) -> Row:
    """COCO's box metrics, in [0, 1], of the newest test run; ValueError, with the fix, if there are none."""
    found = metrics_files(test_dir)
    if not found:
        raise ValueError(f"{test_dir}: no <time>/<time>.json with metrics; run {_TEST_COMMAND} {test_dir}")
    metrics = coco_metrics(read_json(found[-1], dict[str, Any], "the metrics of a test"))
    if metrics.get("mAP") is None:
        raise ValueError(
            f"{found[-1]}: no box mAP; CocoMetric writes none when the detector found nothing at all or format_only is "
            f"set. Look at the log beside it, then run {_TEST_COMMAND} {test_dir} again"
        )
    return metrics


def metrics_files(test_dir: Path) -> list[Path]:
    """The files `<time>/<time>.json` that test runs left in their work dir, oldest first."""
    return sorted(path for path in test_dir.glob("*/*.json") if path.stem == path.parent.name)


def _pointer(work_dir: Path) -> str | None:
    """The checkpoint's name in `last_checkpoint`, which may name a folder of another machine; None without one."""
    path = work_dir / "last_checkpoint"
    return Path(path.read_text(encoding="utf-8", errors="replace").strip()).name if path.is_file() else None


def find_checkpoint(work_dir: Path) -> Path:
    """The checkpoint that `last_checkpoint` names, or the folder's only `.pth` file; ValueError if there is none."""
    named, found = _pointer(work_dir), sorted(work_dir.glob("*.pth"))
    if named is not None and not (work_dir / named).is_file():
        where = f"{work_dir / 'last_checkpoint'} names {named}, which is not in {work_dir}"
        raise ValueError(f"{where}; train again or give checkpoint=FILE")
    if named is None and len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{work_dir}: expected last_checkpoint or one .pth file, found {names}; give checkpoint=FILE")
    return found[0] if named is None else work_dir / named


def read_dumped_config(work_dir: Path) -> tuple[Path, Any] | None:
    """The newest config that mmengine dumped in a work dir, with its path; ValueError if a part of it is missing."""
    found = sorted(work_dir.glob("*/vis_data/config.py")) or sorted(work_dir.glob("*.py"), key=os.path.getmtime)
    if not found:
        return None
    config = load_config(found[-1])
    # mmengine writes it in place, its keys sorted: the last one is there or the process was killed before.
    if "work_dir" not in config:
        raise ValueError(
            f"{found[-1]}: has no `work_dir`, which ends every config that a run dumps: it was killed while it wrote; "
            "start it again with --resume, which writes the config anew"
        )
    return found[-1], config


class _Done(TypedDict):
    command: list[str]


class _Manifest(TypedDict, total=False):
    source: dict[str, Any]


def read_commands(folder: Path) -> list[str]:
    """The commands that made a folder, from `*.done.json` as the demo leaves them; paths below here are relative."""

    def short(word: str) -> str:
        path = Path(word)
        return os.path.relpath(word) if path.is_absolute() and Path.cwd() in path.parents else word

    stamps = [read_json(path, _Done, "a finished command") for path in sorted(folder.glob("*.done.json"))]
    return [shlex.join(map(short, stamp["command"])) for stamp in stamps]


def source_of(checkpoint: Path) -> Path | None:
    """The checkpoint that a converted one was made from, as the manifest beside it says; None without a manifest."""
    manifest = checkpoint.with_suffix(".json")
    source = read_json(manifest, _Manifest, "a manifest").get("source", {}) if manifest.is_file() else {}
    return Path(str(source["path"])) if "path" in source else None
