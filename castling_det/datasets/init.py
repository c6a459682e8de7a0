"""`castling-det init DATA`: configs for a data set, with the sizes and the schedule that its boxes ask for."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from castling_det.datasets.checks import check_annotation_file, raise_for_problems
from castling_det.files import write_json, write_text

__all__ = ["Split", "Statistics", "divide", "find_splits", "main", "write_configs"]

BASE = "castling_det::_base_/own_data.py"
BATCH = 4
"""Images of an iteration, in the base."""
HELD_OUT = 10
"""Without validation files every tenth image is held out, and one of fewer."""
WORDS = {"train": ("train", "train2017"), "val": ("val", "valid", "val2017")}
"""What files and folders of a split are called by COCO, labelling services, YOLO and our converters."""
COCO_FILES = ("annotations/{}.json", "annotations/instances_{}.json", "{}.json", "{}/_annotations.coco.json")
"""Looked for in this order."""
COCO_IMAGES = ("{}", "images/{}", "images", ".")
"""The first that has the file's first image is taken."""
OTHERS = (
    ("from_yolo", "images/{}", "labels/{}"),
    ("from_yolo", "{}/images", "{}/labels"),
    ("from_pascal_voc", "JPEGImages", "Annotations"),
)
"""Readers of supervision, and the folders of images and labels that they take."""


@dataclass(frozen=True)
class Split:
    """A COCO file, and the folder that its file names are in."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Statistics:
    """What the choices are made from; box sizes are square roots of areas, in pixels of the images."""

    images: int
    side: float
    """Median of the longer sides."""
    classes: tuple[str, ...]
    small: float
    """One box in ten is smaller."""
    large: float
    """One box in ten is larger."""

    @classmethod
    def of(cls, annotations: Path) -> Statistics:
        """Of a COCO file; ValueError: it does not pass its checks, or has too few boxes."""
        document = _read(annotations)
        sides = [max(image["width"], image["height"]) for image in document["images"]]
        sizes = [row["bbox"][2:] for row in document["annotations"] if not row.get("iscrowd")]
        boxes = [math.sqrt(width * height) for width, height in sizes]
        if len(boxes) < 2:
            raise ValueError(f"{annotations}: {len(boxes)} boxes; expected at least two to choose sizes from")
        tenths = quantiles(boxes, n=10)
        names = tuple(category["name"] for category in document["categories"])
        return cls(len(sides), median(sides), names, max(tenths[0], 1.0), tenths[-1])

    @property
    def size(self) -> int:
        """Longer side that images are resized to: small boxes get 16 pixels, images at most twice their size."""
        wanted = self.side * min(16 / self.small, 2.0)
        return 32 * round(min(max(wanted, 320), 1280) / 32)

    @property
    def crop(self) -> int:
        """Side of the training images: crops keep large images affordable."""
        return min(self.size, 384)

    @property
    def strides(self) -> tuple[int, ...]:
        """Levels whose anchors, of 8 strides, go from the small boxes to the large ones."""
        scale = self.size / self.side
        first = 4 if self.small * scale < 24 else 8
        return tuple(stride for stride in (4, 8, 16, 32) if first <= stride <= max(2 * first, self.large * scale / 4))

    @property
    def max_iters(self) -> int:
        """Each image is seen 100 times, within bounds."""
        return 200 * round(min(max(100 * self.images / BATCH, 1200), 24_000) / 200)


def find_splits(data: Path, out: Path) -> tuple[Split, Split]:
    """The training and validation data of a folder in COCO's, YOLO's or Pascal VOC's layout.

    Of the two latter, and where no validation data are found, COCO files are written under `out`. ValueError says what
    was looked for.
    """
    train, val = (_coco(data, words) or _converted(data, split, out) for split, words in WORDS.items())
    if train is None:
        names = ", ".join(name.format("train") for name in (*COCO_FILES, *(labels for _, _, labels in OTHERS)))
        raise ValueError(
            f"{data}: no data set was found; looked for {names}; name a COCO file by --train, --val and --images"
        )
    return (train, val) if val else divide(train, out, listed=data / "ImageSets" / "Main")


def _read(annotations: Path) -> dict[str, Any]:
    raise_for_problems(check_annotation_file(annotations), source=str(annotations))
    document: dict[str, Any] = json.loads(annotations.read_text(encoding="utf-8"))
    return document


def _coco(data: Path, words: Iterable[str]) -> Split | None:
    for word in words:
        for file in (data / pattern.format(word) for pattern in COCO_FILES):
            if file.is_file():
                first = _read(file)["images"][0]["file_name"]
                folders = [data / pattern.format(word) for pattern in COCO_IMAGES]
                return Split(file, next((one for one in folders if (one / first).is_file()), folders[0]))
    return None


def _converted(data: Path, split: str, out: Path) -> Split | None:
    """A COCO file of the split in a YOLO or Pascal VOC folder; the latter has all its images in one place."""
    for reader, *names in OTHERS:
        for images, labels in ([data / name.format(word) for name in names] for word in WORDS[split]):
            if not (images.is_dir() and labels.is_dir()) or (reader == "from_pascal_voc" and split == "val"):
                continue
            from supervision import DetectionDataset

            target = out / "annotations" / f"{split}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            names_file = [*sorted(data.glob("*.yaml")), data / "data.yaml"][:1] if reader == "from_yolo" else []
            read = getattr(DetectionDataset, reader)
            read(*map(str, (images, labels, *names_file))).as_coco(annotations_path=str(target))
            return Split(target, images)
    return None


def divide(whole: Split, out: Path, *, listed: Path | None = None) -> tuple[Split, Split]:
    """Holds every tenth image out, in the order of file names, or divides by Pascal VOC's folder of lists."""
    document = _read(whole.annotations)
    images = sorted(document["images"], key=lambda image: image["file_name"])
    every = min(HELD_OUT, len(images))
    held = {image["id"] for image in images[every - 1 :: every]}
    groups = {"train": {image["id"] for image in images} - held, "val": held}
    if listed is not None and (listed / "val.txt").is_file():
        stems = {name: (listed / f"{name}.txt").read_text(encoding="utf-8").split() for name in groups}
        by_stem = {Path(image["file_name"]).stem: image["id"] for image in images}
        groups = {name: {by_stem[stem] for stem in stems[name] if stem in by_stem} for name in groups}
    for name, ids in groups.items():
        chosen = [image for image in images if image["id"] in ids]
        boxes = [row for row in document["annotations"] if row["image_id"] in ids]
        write_json(out / "annotations" / f"{name}.json", {**document, "images": chosen, "annotations": boxes})
    train, val = (Split(out / "annotations" / f"{name}.json", whole.images) for name in groups)
    return train, val


def write_configs(out: Path, train: Split, val: Split, *, flip: bool = True) -> Statistics:
    """Writes softmax.py, castling.py and deploy.py; ValueError: data that cannot be trained on."""
    if present := [name for name in ("softmax.py", "castling.py", "deploy.py") if (out / name).exists()]:
        raise ValueError(f"{out}: {', '.join(present)} is there already; name another folder by --out, or remove it")
    found = Statistics.of(train.annotations)
    for split in (train, val):
        problems = check_annotation_file(
            split.annotations, classes=found.classes, image_root=split.images, level="headers"
        )
        raise_for_problems(problems, source=str(split.annotations))
        for problem in problems:
            print(problem)
    scale = found.size / found.side
    datasets = {
        name: f"data_root={str(split.images.resolve()) + '/'!r}, ann_file={str(split.annotations.resolve())!r}"
        for name, split in (("train", train), ("val", val))
    }
    write_text(out / "softmax.py", f'''\
# By castling-det init: {found.images} images of {found.side:g} pixels, boxes of {found.small:.0f} to {found.large:.0f}.
_base_ = "{BASE}"

classes = {found.classes!r}
size = ({found.size}, {found.size})  # of a whole image: small boxes have {found.small * scale:.0f} pixels then
crop = ({found.crop}, {found.crop})  # of a training image: large images stay affordable
strides = {found.strides!r}  # anchors of {8 * found.strides[0]} to {8 * found.strides[-1]} pixels
max_iters = {found.max_iters}  # of {BATCH} images: {found.max_iters * BATCH / found.images:.0f} times each

_base_.train_pipeline[2].update(prob={0.5 if flip else 0.0})  # 0 where a mirrored object is another one
_base_.train_pipeline[3].update(scale=size)
_base_.train_pipeline[4].update(crop_size=crop)
_base_.test_pipeline[1].update(scale=size)
data = dict(metainfo=dict(classes=classes), data_prefix=dict(img=""))
train_dataloader = dict(dataset=dict({datasets["train"]}, pipeline=_base_.train_pipeline, **data))
val_dataloader = dict(dataset=dict({datasets["val"]}, pipeline=_base_.test_pipeline, **data))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file={str(val.annotations.resolve())!r})
head = dict(num_classes=len(classes), anchor_generator=dict(strides=strides))
model = dict(backbone=dict(img_size=crop[0], attention="softmax"), neck=dict(out_strides=strides), bbox_head=head)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 4)
_base_.param_scheduler[1].update(end=max_iters, T_max=max_iters - 40)
param_scheduler = _base_.param_scheduler
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
''')
    write_text(out / "castling.py", '''\
_base_ = "./softmax.py"

model = dict(backbone=dict(attention="castling", attn_cfg=dict(threshold=1.0, threshold_unit="uniform")))
# The mask rises until nothing passes.
hook = dict(type="castling_det.MaskAnnealingHook", schedule="geometric", begin=0.4, empty_from=0.7)
custom_hooks = [*_base_.custom_hooks, hook]
''')
    write_text(out / "deploy.py", '''\
_base_ = "./softmax.py"

model = dict(backbone=dict(attention="linear"))
''')
    return found


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="castling-det init", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of a data set: COCO JSON, YOLO or Pascal VOC")
    parser.add_argument("--out", type=Path, default=Path("configs"), help="where to write (default: %(default)s)")
    parser.add_argument("--train", type=Path, metavar="JSON", help="COCO file to train on, where it is not found")
    parser.add_argument("--val", type=Path, metavar="JSON", help="COCO file to validate on")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of both files")
    parser.add_argument("--no-flip", action="store_true", help="mirrored objects are others, as in text and music")
    args = parser.parse_args(argv)
    images = args.images or args.data
    try:
        if args.train is None:
            train, val = find_splits(args.data, args.out)
        elif args.val is None:
            train, val = divide(Split(args.train, images), args.out)
        else:
            train, val = Split(args.train, images), Split(args.val, images)
        found = write_configs(args.out, train, val, flip=not args.no_flip)
    except (ValueError, OSError) as error:
        print(f"castling-det init: {error}", file=sys.stderr)
        return 1
    out = args.out
    print(
        f"{found.images} training images, {len(found.classes)} classes; whole images at {found.size} pixels, crops of "
        f"{found.crop}, strides {', '.join(map(str, found.strides))}, {found.max_iters} iterations. Next:\n"
    )
    for command in (
        ("train", out / "castling.py", "--work-dir", out / "castling"),
        ("convert", out / "castling.py", out / "castling" / f"iter_{found.max_iters}.pth", out / "deploy.pth"),
        ("export", out / "deploy.py", out / "deploy.pth", out / "deploy.onnx"),
        ("detect", out / "deploy.onnx", val.images),
    ):
        print("  castling-det", shlex.join(map(str, command)))
    return 0
