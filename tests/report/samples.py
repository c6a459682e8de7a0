"""Work dirs of the very form that MMDetection's tools leave, small, from seeded random numbers; records by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from castling_det.report.evaluation import evaluate_boxes
from castling_det.report.records import METRICS, Machine, Report, RunRecord

MACHINE = Machine(torch="2.11.0", device="cpu", cpu="a CPU", threads=2, python="3.11.7", commit=None)
CONFIG = """\
default_scope = "mmdet"
randomness = dict(seed={seed})
load_from = {load_from!r}
model = dict(
    type="RetinaNet",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(
        type="castling_det.CastlingViT", embed_dims=32, depth=2, num_heads=2, img_size=64, attention={attention!r}),
    neck=dict(type="FPN", in_channels=[32], out_channels=16, num_outs=1),
    bbox_head=dict(
        type="RetinaHead", num_classes=1, in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], scales=[4], strides=[16])),
    test_cfg=dict())
test_dataloader = dict(dataset=dict(pipeline=[dict(type="Resize", scale=(128, 128), keep_ratio=True)]))
work_dir = "work_dirs/x"
"""


def make_report(*runs: RunRecord) -> Report:
    """`runs` compared with `softmax`, of which `deploy` is shipped."""
    return Report("softmax", "deploy", "data", "command", "now", MACHINE, runs)


def make_run(name: str, seed: int | None, mAP: float | None, **fields: Any) -> RunRecord:
    """A run with two metrics, or a failed one where `mAP` is None."""
    if mAP is None:
        return RunRecord(name, reason="it | broke\nbadly <here>", seed=seed, **fields)
    return RunRecord(name, **{"seed": seed, "metrics": {"mAP": mAP, "mAP50": 2 * mAP}, **fields})


def dump(path: Path, value: object) -> Path:
    """Writes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_data(root: Path, *, images: int = 6, side: int = 64, seed: int = 0) -> tuple[Path, Path]:
    """Noise images with a few boxes each, one of them a crowd; returns the annotation file and the image folder."""
    random = np.random.default_rng(seed)
    folder = root / "images"
    folder.mkdir(parents=True)
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tree"}]}
    for image_id in range(images):
        name = f"tile_{image_id}.png"
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
        document["images"].append({"id": image_id, "file_name": name, "height": side, "width": side})
        for index in range(4):
            x, y = random.integers(0, side - 20, 2).tolist()
            document["annotations"].append(
                {"id": len(document["annotations"]) + 1, "image_id": image_id, "category_id": 1,
                 "bbox": [x, y, 16, 18], "area": 288, "iscrowd": int(index == 3)}
            )  # fmt: skip
    return dump(root / "val.json", document), folder


def write_predictions(path: Path, annotations: Path, *, skip: int = 0, seed: int = 0) -> None:
    """The annotated boxes, shifted a little and scored; on every second image the first `skip` ones are left out."""
    random = np.random.default_rng(seed)
    rows, seen = [], dict.fromkeys(range(1000), 0)
    for annotation in json.loads(annotations.read_text())["annotations"]:
        image_id = annotation["image_id"]
        seen[image_id] += 1
        if annotation["iscrowd"] or (image_id % 2 and seen[image_id] <= skip):
            continue
        x, y, width, height = annotation["bbox"]
        shift = random.uniform(-1, 1, 2).tolist()
        rows.append(
            {"image_id": image_id, "category_id": annotation["category_id"], "score": float(random.uniform(0.4, 1)),
             "bbox": [x + shift[0], y + shift[1], width, height]}
        )  # fmt: skip
    rows.append({"image_id": 0, "category_id": 1, "bbox": [0, 0, 3, 3], "score": 0.9})
    rows.append({"image_id": 0, "category_id": 1, "bbox": [1, 1, 3, 3], "score": 0.01})
    dump(path, rows)


def write_session(
    work_dir: Path, time: str, steps: range, *, total: int = 200, mask: bool = False, loss: float = 2.0
) -> None:
    """A training session: a row at each of `steps`, validation every 50 iterations, in the order mmengine writes."""
    folder = work_dir / time / "vis_data"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in steps:
        progress = step / total
        if mask:
            kept = max(0.0, 0.4 * (1 - progress / 0.8))
            layers = {f"mask/kept_fraction/blocks.{i}": kept * (1 + i / 4) for i in range(4)}
            layers |= {f"mask/kept_mass/blocks.{i}": kept * 2 / (1 + i / 4) for i in range(4)}
            rows.append({"mask/threshold": 0.02 * 50**progress, "mask/aux_scale": 1.0, **layers, "step": step})
        value = loss * math.exp(-2 * progress) + 0.05 * math.sin(step)
        rows.append(
            {"lr": 0.001, "data_time": 0.01, "grad_norm": 1.5, "loss": value, "loss_cls": value / 2, "time": 0.5,
             "iter": step, "step": step}
        )  # fmt: skip
        if step % 50 == 0:
            value = 0.3 * progress + 0.01 * math.sin(loss * step)
            rows.append(
                {"coco/bbox_mAP": value, "coco/bbox_mAP_50": 2 * value, "data_time": 0.1, "time": 0.2, "step": step}
            )
    (folder / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_test(
    test_dir: Path, *, mAP: float, attention: str = "softmax", seed: int = 0, checkpoint: Path | None = None,
    time: str = "20260101_120000", metrics: dict[str, float | None] | None = None,
) -> None:  # fmt: skip
    """What tools/test.py leaves: metrics, made up from mAP or as given, with three digits, and the dumped config."""
    found = metrics or {"mAP": mAP, "mAP50": 2.2 * mAP, "mAP75": 0.6 * mAP, "mAP_s": 0.5 * mAP, "mAP_m": 1.1 * mAP}
    keys = {name: name.replace("mAP50", "mAP_50").replace("mAP75", "mAP_75") for name in METRICS}
    rounded = {name: -1.0 if (value := found.get(name)) is None else round(value, 3) for name in METRICS}
    document = {f"coco/bbox_{keys[name]}": value for name, value in rounded.items()} | {"data_time": 0.01, "time": 0.1}
    dump(test_dir / time / f"{time}.json", document)
    config = CONFIG.format(seed=seed, load_from=str(checkpoint) if checkpoint else None, attention=attention)
    (test_dir / time / "vis_data").mkdir()
    (test_dir / time / "vis_data" / "config.py").write_text(config)


def write_checkpoint(work_dir: Path, name: str = "iter_200.pth", content: bytes = b"weights") -> Path:
    """A file that stands for a checkpoint, and `last_checkpoint` as mmengine writes it, on another machine."""
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / name).write_bytes(content)
    (work_dir / "last_checkpoint").write_text(f"/elsewhere/{work_dir.name}/{name}")
    return work_dir / name


def write_demo(root: Path, annotations: Path, *, seeds: int = 2) -> list[str]:
    """softmax, castling and deploy for each seed, as the demo lays them; returns the `--run` arguments."""
    runs = []
    for seed in range(seeds):
        folder = root / f"seed{seed}"
        for name, loss in (("softmax", 2.0), ("castling", 2.2)):
            write_checkpoint(folder / name)
            steps = range(10, 201, 10)
            write_session(folder / name, "20260101_100000", steps, mask=name == "castling", loss=loss + 0.1 * seed)
            command = ["python", "train.py", f"{name}.py", "--cfg-options", f"randomness.seed={seed}"]
            dump(folder / name / "train.done.json", {"key": "0", "command": command})
        manifest = {"format": 1, "source": {"path": str(folder / "castling" / "iter_200.pth")}}
        dump(folder / "deploy" / "deploy.json", manifest)
        (folder / "deploy" / "deploy.pth").write_bytes(b"deployed")
        tested = (("softmax", "softmax", "iter_200.pth"), ("castling", "castling", "iter_200.pth"))
        for name, attention, weights in (*tested, ("deploy", "linear", "deploy.pth")):
            predictions = folder / name / "test" / "predictions.bbox.json"
            write_predictions(predictions, annotations, skip=2 if name == "softmax" else 0, seed=seed)
            scored = evaluate_boxes(json.loads(annotations.read_text()), json.loads(predictions.read_text()))
            write_test(
                predictions.parent, mAP=0, seed=seed, checkpoint=folder / name / weights, attention=attention,
                metrics=scored.metrics,
            )  # fmt: skip
            runs.append(f"{name}={folder / name}")
    return runs
