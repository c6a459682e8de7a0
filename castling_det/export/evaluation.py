"""mAP of exported files on a config's test data, beside PyTorch's."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castling_det.files import write_text
from castling_det.report.configs import load_config
from castling_det.report.evaluation import evaluate_boxes
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table
from castling_det.runtime.detector import Detector

__all__ = ["SCHEMA", "Accuracy", "AccuracyReport", "compare_files", "read_accuracy"]

SCHEMA = "castling_det.export.accuracy/1"
FIELD = "report"
LIMITS = {"float32": 0.001, "float16": 0.005, "int8": None}
"""How far mAP may be from PyTorch's."""


@dataclass(frozen=True)
class Accuracy:
    """One file."""

    name: str
    runtime: str
    precision: str
    bytes: int
    map: float
    """In [0, 1]."""
    map50: float
    difference: float
    """Of mAP to PyTorch's."""


@dataclass(frozen=True)
class AccuracyReport:
    """PyTorch first, then each file."""

    config: str
    images: int
    command: str
    machine: Machine
    rows: tuple[Accuracy, ...]

    def problems(self) -> list[str]:
        """Files whose mAP is further from PyTorch's than its precision allows."""
        found = []
        for row in self.rows:
            limit = LIMITS[row.precision]
            if limit is not None and abs(row.difference) > limit:
                found.append(f"{row.name}: mAP differs by {row.difference:+.4f}, allowed {limit:g}")
        return found

    def markdown(self) -> str:
        """The table, the command and the machine."""
        header = ("file", "runtime", "precision", "MB", "mAP", "mAP50", "mAP - PyTorch")
        rows = [
            (
                row.name,
                row.runtime,
                row.precision,
                f"{row.bytes / 1e6:.2f}",
                f"{row.map:.4f}",
                f"{row.map50:.4f}",
                f"{row.difference:+.4f}",
            )
            for row in self.rows
        ]
        machine = self.machine
        table = "\n".join(markdown_table(header, rows))
        return (
            f"{self.config}:\n\n{table}\n\nmAP in [0, 1], {self.images} images, one at a time.\n\n"
            f"`{self.command}`\n\n{machine.cpu}, {machine.threads} threads, torch {machine.torch}, Python "
            f"{machine.python}, commit {machine.commit}\n"
        )

    def write(self, folder: Path) -> None:
        """`accuracy.json` and `accuracy.md`."""
        write_document(folder / "accuracy.json", self, schema=SCHEMA, field=FIELD)
        write_text(folder / "accuracy.md", self.markdown())


def read_accuracy(path: str | os.PathLike[str]) -> AccuracyReport:
    """Reads what `AccuracyReport.write` wrote; raises ValueError for anything else."""
    return read_document(path, AccuracyReport, schema=SCHEMA, field=FIELD, fix="run tools/compare_exports.py again")


def compare_files(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    *,
    command: str = "",
) -> AccuracyReport:
    """Evaluates the checkpoint with PyTorch and each ONNX file with onnxruntime, on the config's test data.

    Raises:
        ValueError: unusable config, checkpoint, file or annotations.
    """
    dataset = load_config(config).test_dataloader.dataset
    root = Path(dataset.get("data_root") or "")
    annotations, folder = root / dataset.ann_file, root / dataset.get("data_prefix", {}).get("img", "")
    try:
        document = json.loads(annotations.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config {config}: annotations {annotations}: cannot be read ({error})") from error
    torch_figures = _figures(Detector(checkpoint, str(config)), document, folder)
    rows = [_row(Path(checkpoint), "PyTorch", "float32", torch_figures, torch_figures)]
    for file in map(Path, files):
        detector = Detector(file)
        precision = str(_precision(file))
        rows.append(_row(file, "onnxruntime", precision, _figures(detector, document, folder), torch_figures))
    return AccuracyReport(Path(config).name, len(document["images"]), command, this_machine(), tuple(rows))


def _figures(detector: Detector, document: dict[str, Any], folder: Path) -> tuple[float, float]:
    """mAP and mAP50."""
    ids = {str(category["name"]): int(category["id"]) for category in document["categories"]}
    missing = [name for name in detector.classes if name not in ids]
    if missing:
        raise ValueError(f"annotations: no category {', '.join(missing)}, which the detector knows")
    categories = tuple(ids[name] for name in detector.classes)
    results: list[dict[str, Any]] = []
    for image in document["images"]:
        results += detector(folder / image["file_name"]).to_coco(image["id"], categories)
    metrics = evaluate_boxes(document, results).metrics
    return metrics["mAP"] or 0.0, metrics["mAP50"] or 0.0


def _row(
    path: Path, runtime: str, precision: str, figures: tuple[float, float], reference: tuple[float, float]
) -> Accuracy:
    return Accuracy(path.name, runtime, precision, path.stat().st_size, *figures, difference=figures[0] - reference[0])


def _precision(file: Path) -> Any:
    import onnx

    from castling_det.export.metadata import FileMetadata

    model = onnx.load(file, load_external_data=False)
    return FileMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, file).precision
