"""What MMDetection's train and test tools leave in their work dirs: configs, checkpoints, metrics, predictions."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from castling_det.report.configs import load_config
from castling_det.report.scalars import coco_metrics

__all__ = [
    "PREDICTIONS",
    "find_checkpoint",
    "metrics_files",
    "read_commands",
    "read_dumped_config",
    "read_json",
    "read_test_metrics",
    "source_of",
]

TEST_COMMAND = "tools/test.py CONFIG CHECKPOINT --work-dir"
PREDICTIONS = "predictions.bbox.json"


def read_test_metrics(test_dir: Path) -> dict[str, float | None]:
    """COCO's box metrics, in [0, 1], of the newest test run: `<time>/<time>.json`.

    Raises:
        ValueError: no such file, or no box metric in it; names the file and the fix.
    """
    found = metrics_files(test_dir)
    if not found:
        raise ValueError(f"{test_dir}: no <time>/<time>.json with metrics; run {TEST_COMMAND} {test_dir}")
    row = read_json(found[-1])
    metrics = coco_metrics(row) if isinstance(row, dict) else {}
    if metrics.get("mAP") is None:
        raise ValueError(
            f"{found[-1]}: no box mAP; CocoMetric writes none when the detector found nothing at all or format_only is "
            f"set. Look at the log beside it, then run {TEST_COMMAND} {test_dir} again"
        )
    return metrics


def metrics_files(test_dir: Path) -> list[Path]:
    """The files `<time>/<time>.json` that test runs left in their work dir, oldest first."""
    return sorted(path for path in test_dir.glob("*/*.json") if path.stem == path.parent.name)


def find_checkpoint(work_dir: Path) -> Path:
    """The checkpoint that `last_checkpoint` names, or the only `.pth` file of the folder.

    A work dir that was moved keeps its checkpoint: the name counts, not the folder that it was written in.

    Raises:
        ValueError: none, or several and nothing says which.
    """
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file():
        path = work_dir / Path(pointer.read_text(encoding="utf-8").strip()).name
        if path.is_file():
            return path
        raise ValueError(
            f"{pointer} names {path.name}, which is not in {work_dir}; train again or give checkpoint=FILE"
        )
    found = sorted(work_dir.glob("*.pth"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{work_dir}: expected last_checkpoint or one .pth file, found {names}; give checkpoint=FILE")
    return found[0]


def read_dumped_config(work_dir: Path) -> tuple[Path, Any] | None:
    """The config that mmengine dumped in a work dir, the newest one, with its path; None if there is none.

    Raises:
        ValueError: it cannot be read, or a part of it is missing; names it and the fix.
    """
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


def read_commands(folder: Path) -> tuple[str, ...]:
    """The commands that made a folder, from the stamps `*.done.json` of tools/steps.py; empty without any.

    Paths below the current folder are given relative to it.
    """
    commands = []
    for path in sorted(folder.glob("*.done.json")):
        words = read_json(path).get("command", [])
        commands.append(shlex.join(os.path.relpath(word) if _is_below_here(word) else word for word in words))
    return tuple(commands)


def source_of(checkpoint: Path) -> Path | None:
    """The checkpoint that a converted one was made from, as the manifest beside it says; None without a manifest."""
    manifest = checkpoint.with_suffix(".json")
    if not manifest.is_file():
        return None
    document = read_json(manifest)
    source = document.get("source") if isinstance(document, dict) else None
    return Path(source["path"]) if isinstance(source, dict) and "path" in source else None


def _is_below_here(word: str) -> bool:
    return os.path.isabs(word) and Path(word).is_relative_to(Path.cwd())


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it cannot be read, or is not JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
