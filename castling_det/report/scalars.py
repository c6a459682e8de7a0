"""The scalars that mmengine leaves in a training work dir: `<time>/vis_data/scalars.json`, one session a folder.

Rows of the training loop carry `iter`; rows of other hooks only `step`; rows of validation carry metrics, and as `step`
the epoch when the loop counts epochs. A resumed run has several sessions: what an earlier one logged beyond the
point at which a later one began is of a future that was given up, and is dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castling_det.report.record import METRICS, MaskOccupancy, Series

__all__ = ["TrainingLog", "coco_metrics", "read_training_log"]

_EPOCH_LENGTH = re.compile(r"Epoch\(train\)\s*\[\s*\d+\]\[\s*\d+/(\d+)\]")
_COUNTERS = frozenset({"step", "iter", "epoch"})
_MASK = re.compile(r"^(?:train/)?mask/(threshold|kept_fraction/.+|kept_mass/.+)$")
_COCO_KEYS = {
    "mAP": "mAP",
    "mAP50": "mAP_50",
    "mAP75": "mAP_75",
    "mAP_s": "mAP_s",
    "mAP_m": "mAP_m",
    "mAP_l": "mAP_l",
}


@dataclass(frozen=True)
class TrainingLog:
    """What a training run logged, over its iterations. `seconds` is the time of the iterations without validation."""

    scalars: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    mask: MaskOccupancy = field(default_factory=MaskOccupancy)
    iterations: int | None = None
    seconds: float | None = None


def coco_metrics(row: dict[str, Any]) -> dict[str, float | None]:
    """COCO's box metrics among the keys of a row, whatever their prefix; empty if there are none.

    COCO writes -1 where no annotation has the asked size; that is None here.
    """
    metrics: dict[str, float | None] = {}
    for name in METRICS:
        for key, value in row.items():
            if key.rpartition("/")[2] == f"bbox_{_COCO_KEYS[name]}" and isinstance(value, (int, float)):
                metrics[name] = float(value) if math.isfinite(value) and value >= 0 else None
    return metrics


def read_training_log(work_dir: Path) -> TrainingLog:
    """Reads all sessions of a training work dir; empty if it holds none.

    Raises:
        ValueError: a line that is not JSON, other than a last one that a kill cut short; names the file and the line.
    """
    tables: dict[str, dict[int, dict[str, float | None]]] = {kind: {} for kind in ("train", "val", "mask")}
    epoch_length = None
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        rows = _read_rows(path)
        epoch_length = _epoch_length(path.parents[1]) or epoch_length
        session = _by_iteration(rows, epoch_length)
        begins = min((step for table in session.values() for step in table), default=None)
        if begins is None:
            continue
        for kind, table in tables.items():
            # A resumed session may begin with the validation of the checkpoint, which is of the last kept step.
            kept = {step: row for step, row in table.items() if step <= begins}
            tables[kind] = kept | session[kind]
    scalars = _series(tables["train"])
    last = max(tables["train"], default=0)
    iterations = _iterations(work_dir, epoch_length, last) if last else None
    return TrainingLog(
        scalars=scalars,
        validation=_series(tables["val"]),
        mask=_mask(_series(tables["mask"])),
        iterations=iterations,
        seconds=_seconds(scalars.get("time"), iterations),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}): damaged; remove the line, or train again"
            ) from error
        rows.append(row)
    return rows


def _by_iteration(
    rows: list[dict[str, Any]], epoch_length: int | None
) -> dict[str, dict[int, dict[str, float | None]]]:
    """The rows of one session by kind and training iteration."""
    tables: dict[str, dict[int, dict[str, float | None]]] = defaultdict(dict)
    last, epoch = 0, None
    for row in rows:
        metrics = coco_metrics(row)
        if metrics:
            step = int(row.get("step", 0))
            if epoch is not None and step == epoch:
                step = step * epoch_length if epoch_length is not None else last
            # A loop that counts iterations writes them here, or 0 where its logger counts epochs.
            tables["val"][max(last, step)] = metrics
            continue
        step = int(row.get("iter", row.get("step", 0)))
        mask = {match.group(1): _finite(row[key]) for key in row if (match := _MASK.match(key))}
        if mask:
            tables["mask"].setdefault(step, {}).update(mask)
        if "iter" in row:
            last, epoch = step, row.get("epoch")
            values = {key: _finite(value) for key, value in row.items() if _is_number(value)}
            values = {key: value for key, value in values.items() if key not in _COUNTERS and not _MASK.match(key)}
            if values:  # ExactResumeHook notes where it resumes, and nothing else
                tables["train"][step] = values
    return {kind: tables[kind] for kind in ("train", "val", "mask")}


def _series(table: dict[int, dict[str, float | None]]) -> dict[str, Series]:
    keys = dict.fromkeys(key for row in table.values() for key in row)
    series = {}
    for key in keys:
        points = [(step, table[step][key]) for step in sorted(table) if key in table[step]]
        series[key] = Series(tuple(step for step, _ in points), tuple(value for _, value in points))
    return series


def _mask(series: dict[str, Series]) -> MaskOccupancy:
    def layers(quantity: str) -> dict[str, Series]:
        named = {key.partition("/")[2]: value for key, value in series.items() if key.startswith(f"{quantity}/")}
        return dict(sorted(named.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))

    return MaskOccupancy(layers("kept_fraction"), layers("kept_mass"), series.get("threshold", Series()))


def _epoch_length(session: Path) -> int | None:
    """Iterations an epoch, as the session's log says; None for a loop that counts iterations, or without a log."""
    for path in session.glob("*.log"):
        found = _EPOCH_LENGTH.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            return int(found.group(1))
    return None


def _iterations(work_dir: Path, epoch_length: int | None, last_logged: int) -> int:
    """Up to the last checkpoint, or the last logged iteration if that is later."""
    pointer = work_dir / "last_checkpoint"
    found = re.search(r"(epoch|iter)_(\d+)\.pth\s*$", pointer.read_text()) if pointer.is_file() else None
    if found is None:
        return last_logged
    unit = 1 if found.group(1) == "iter" else (epoch_length or 0)
    return max(last_logged, int(found.group(2)) * unit)


def _seconds(time: Series | None, iterations: int | None) -> float | None:
    """Each logged `time` is the mean of the iterations since the row before it; the last ones count like the logged."""
    if time is None or not iterations:
        return None
    total, counted, before = 0.0, 0, 0
    for step, value in zip(time.steps, time.values, strict=True):
        if value is not None:
            total += value * (step - before)
            counted += step - before
        before = step
    return total * iterations / counted if counted else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None
