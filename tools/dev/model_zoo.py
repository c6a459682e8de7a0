"""Counts parameters and multiply-adds of every COCO model under configs/, with softmax and with linear attention.

Writes results/model_zoo.json, of which tools/dev/tables.py makes the table of docs/model_zoo.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from castling_det.config import load_config, network_shape
from castling_det.report.complexity import detector_complexity
from castling_det.report.records import read_document, write_document
from castling_det.report.render import markdown_table

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "castling_det.model_zoo/1"
IMAGE = (800, 1280)
"""Height and width of the image that the test pipelines resize: published figures are counted on it."""


@dataclass(frozen=True)
class ZooModel:
    """One model at the size that its config brings `IMAGE` to.

    `gmacs_window` is of a second softmax baseline, which attends in windows, where there is one. What could not be
    counted is None, and `reason` says why.
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


def zoo_models(configs: Path) -> list[Path]:
    """The softmax configs of every COCO model under `configs`, in the order of family and name."""
    return sorted(path for path in configs.glob("[!_]*/*_softmax_*.py") if path.stem.endswith("_coco"))


def measured(path: Path) -> ZooModel:
    """The model of a softmax config, beside which those of the other attentions stand."""
    name, _, recipe = path.stem.partition("_softmax_")
    shape = network_shape(load_config(path), IMAGE)
    files = [path.with_name(f"{name}_{mode}_{recipe}.py") for mode in ("softmax", "linear", "softmax-window")]
    try:
        softmax, linear, *windows = (detector_complexity(load_config(f), shape) for f in files if f.exists())
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        return ZooModel(path.parent.name, name, recipe, shape, None, None, None, reason=reason)
    return ZooModel(
        family=path.parent.name,
        name=name,
        recipe=recipe,
        shape=shape,
        params=linear.params,
        gmacs_softmax=softmax.gmacs,
        gmacs_linear=linear.gmacs,
        gmacs_window=windows[0].gmacs if windows else None,
        reason=f"without {', '.join(linear.uncounted)}" if linear.uncounted else None,
    )


def read_zoo(path: Path) -> ModelZoo:
    """Reads the record; raises ValueError for another file."""
    return read_document(path, ModelZoo, schema=SCHEMA, field="model_zoo", fix="run tools/dev/model_zoo.py again")


def zoo_markdown(zoo: ModelZoo) -> str:
    """Two rows a model, three where a baseline has windows; mAP is empty until a model is trained on COCO."""
    body, notes = [], []
    for model in zoo.models:
        size, params = "{} x {}".format(*model.shape), "-" if model.params is None else f"{model.params / 1e6:.2f}"
        rows = {"softmax": model.gmacs_softmax, "softmax, windows": model.gmacs_window, "linear": model.gmacs_linear}
        for attention, gmacs in rows.items():
            if gmacs is not None or attention != "softmax, windows":
                text = "-" if gmacs is None else f"{gmacs:.2f}" if gmacs < 10 else f"{gmacs:.0f}"
                body.append([model.name, size, attention, params, text, ""])
        if model.reason is not None:
            notes.append(f"- `{model.name}`: {model.reason}")
    head = ("model", "input", "attention", "params (M)", "GMACs", "mAP")
    return "\n".join([*markdown_table(head, body), *(["", *notes] if notes else []), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "model_zoo.json", help="the JSON record")
    parser.add_argument("--match", default="", help="only models whose config has this in its name")
    args = parser.parse_args(arguments)
    paths = [path for path in zoo_models(ROOT / "configs") if args.match in path.stem]
    models = tuple(map(measured, track(paths, "model zoo", console=Console(stderr=True), transient=True)))
    zoo = ModelZoo("tools/dev/model_zoo.py", models)
    write_document(args.out, zoo, schema=SCHEMA, field="model_zoo")
    print(zoo_markdown(zoo))
    return 0


if __name__ == "__main__":
    sys.exit(main())
