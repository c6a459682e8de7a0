"""The table of our COCO models: parameters and multiply-adds in closed form, softmax beside linear, and the peers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from castling_det.report.complexity import detector_complexity
from castling_det.report.configs import load_config, network_shape
from castling_det.report.records import read_document, write_document
from castling_det.report.render import markdown_table

__all__ = [
    "PEERS",
    "ModelZoo",
    "ZooModel",
    "measure_zoo",
    "peers_markdown",
    "read_zoo",
    "write_zoo",
    "zoo_markdown",
    "zoo_models",
]

SCHEMA = "castling_det.model_zoo/1"


_IMAGE = (800, 1280)
"""Height and width of the image that the test pipelines resize: the one that published figures are counted on."""


@dataclass(frozen=True)
class ZooModel:
    """One model at the size that its config brings an image of 800 x 1280 to.

    A number is None where an operation has no closed form; `reason` says which.
    `params` are those of the deployed model; `gmacs_*` are 10^9 multiply-adds of one image. `gmacs_window` is that of
    the second softmax baseline, which attends in windows, for the models that have one.
    """

    family: str
    name: str
    recipe: str
    shape: tuple[int, int]
    params: int | None
    gmacs_softmax: float | None
    gmacs_linear: float | None
    gmacs_window: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ModelZoo:
    """All models, by family and name."""

    created_by: str
    models: tuple[ZooModel, ...]


# Box mAP on COCO val, GMACs (half of what is published as FLOPs where the source counts two a multiply-add), source.
PEERS: tuple[tuple[str, str, str, str, str], ...] = (
    ("PicoDet-S 320 (ESNet)", "320", "0.99", "0.37", "27.1, PaddleDetection configs/picodet/legacy_model"),
    ("PicoDet-S 416 (ESNet)", "416", "0.99", "0.62", "30.7, the same"),
    ("PicoDet-M 416 (ESNet)", "416", "2.15", "1.25", "34.8, the same"),
    ("PicoDet-L 416 (ESNet)", "416", "3.30", "1.88", "36.6, the same"),
    ("PicoDet-L 640 (ESNet)", "640", "3.30", "4.46", "40.9, the same"),
    ("NanoDet-Plus-m 416", "416", "1.17", "0.76", "30.4, RangiLyu/nanodet"),
    ("NanoDet-Plus-m-1.5x 416", "416", "2.44", "1.49", "34.1, the same"),
    ("YOLOX-Nano", "416", "0.91", "0.54", "25.8, Megvii-BaseDetection/YOLOX"),
    ("YOLOX-Tiny", "416", "5.06", "3.23", "32.8, the same"),
    ("Castling-ViT, five points of the paper's figure", "-", "-", "0.62 to 5.30", "28.1 to 37.3, arXiv 2211.10526"),
    ("Swin-T Mask R-CNN 1x, softmax", "800 x 1280", "48", "267", "43.7, arXiv 2308.00442"),
    ("FLatten-Swin-T Mask R-CNN 1x", "800 x 1280", "49", "268", "44.2, arXiv 2308.00442"),
    ("Agent-Swin-T Mask R-CNN 1x", "800 x 1280", "48", "276", "44.6, LeapLabTHU/Agent-Attention"),
    ("MLLA-T Mask R-CNN 1x", "800 x 1280", "44", "255", "46.8, LeapLabTHU/MLLA"),
    ("MViTv2-T Mask R-CNN 36 epochs, softmax", "800 x 1280", "44", "279", "48.3, arXiv 2112.01526"),
    ("ViTDet-B Mask R-CNN 100 epochs, softmax", "1024 x 1024", "-", "-", "51.6, arXiv 2203.16527"),
)
"""Name, input, parameters in millions, GMACs, mAP and source, as published: not measured here."""

_HEAD = ("model", "input", "attention", "params (M)", "GMACs", "mAP")


def zoo_models(configs: Path) -> list[Path]:
    """The softmax configs of every COCO model under `configs`, in the order of family and name."""
    return sorted(path for path in configs.glob("[!_]*/*_softmax_*.py") if path.stem.endswith("_coco"))


def measure_zoo(paths: Sequence[Path], *, created_by: str, progress: Callable[[str], None] | None = None) -> ModelZoo:
    """Counts every model twice, with softmax and with linear attention.

    Args:
        paths: softmax configs, beside which stand those of linear attention.
        created_by: the command, for the record.
        progress: called with the name of the model that comes next.
    """
    models = []
    for path in paths:
        if progress is not None:
            progress(path.stem)
        models.append(_measured(path))
    return ModelZoo(created_by, tuple(models))


def _measured(path: Path) -> ZooModel:
    name, _, recipe = path.stem.partition("_softmax_")
    config = load_config(path)
    shape = network_shape(config, _IMAGE)
    try:
        softmax = detector_complexity(config, shape, name=path.name)
        linear = detector_complexity(load_config(path.with_name(f"{name}_linear_{recipe}.py")), shape)
        window = path.with_name(f"{name}_softmax-window_{recipe}.py")
        gmacs_window = detector_complexity(load_config(window), shape).gmacs if window.exists() else None
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        return ZooModel(path.parent.name, name, recipe, shape, None, None, None, reason=reason)
    return ZooModel(path.parent.name, name, recipe, shape, linear.params, softmax.gmacs, linear.gmacs, gmacs_window)


def write_zoo(path: str | os.PathLike[str], zoo: ModelZoo) -> None:
    """Writes the record as JSON."""
    write_document(path, zoo, schema=SCHEMA, field="model_zoo")


def read_zoo(path: str | os.PathLike[str]) -> ModelZoo:
    """Reads what `write_zoo` wrote.

    Raises:
        ValueError: not such a file; names it and the fix.
    """
    return read_document(path, ModelZoo, schema=SCHEMA, field="model_zoo", fix="run tools/model_zoo.py again")


def zoo_markdown(zoo: ModelZoo) -> str:
    """Two rows a model, three where a baseline has windows; mAP is empty until a model is trained on COCO."""
    body, notes = [], []
    for model in zoo.models:
        size = "{} x {}".format(*model.shape)
        params = "-" if model.params is None else f"{model.params / 1e6:.2f}"
        rows = [("softmax", model.gmacs_softmax), ("linear", model.gmacs_linear)]
        if model.gmacs_window is not None:
            rows.insert(1, ("softmax, windows", model.gmacs_window))
        for attention, gmacs in rows:
            body.append([model.name, size, attention, params, "-" if gmacs is None else _gmacs(gmacs), ""])
        if model.reason is not None:
            notes.append(f"- `{model.name}` is not counted: {model.reason}")
    return "\n".join([*markdown_table(_HEAD, body), *(["", *notes] if notes else [])]) + "\n"


def peers_markdown() -> str:
    """The peers as published."""
    head = ("peer", "input", "params (M)", "GMACs", "mAP, source")
    return "\n".join(markdown_table(head, PEERS)) + "\n"


def _gmacs(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
