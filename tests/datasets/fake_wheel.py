"""A small wheel of the same form as the real one: valid for pip, images and VOC files in the same places."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from pathlib import Path

from PIL import Image

from tests.datasets.converters import common, tree_crowns

FILENAME = "deepforest-2.1.0-py3-none-any.whl"
# Width, height, PNG mode: alpha, palette and grey must all come out as RGB.
SIZES = {
    "2019_YELL_2_528000_4978000_image_crop2": (150, 170, "RGBA"),
    "2019_YELL_2_541000_4977000_image_crop": (130, 90, "RGB"),
    "OSBS_029": (64, 64, "P"),
    "SOAP_061": (70, 50, "L"),
}
Corners = tuple[float, float, float, float]


def random_boxes(name: str, count: int = 12) -> list[Corners]:
    width, height, _ = SIZES[name]
    rng = random.Random(name)
    boxes = []
    for _ in range(count):
        x, y = rng.randrange(width - 10), rng.randrange(height - 10)
        boxes.append((x, y, min(x + rng.randrange(8, 30), width), min(y + rng.randrange(8, 30), height)))
    return sorted(set(boxes))


def png(name: str) -> bytes:
    width, height, mode = SIZES[name]
    rng = random.Random(name)
    image = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
    if mode == "RGBA":
        image.putalpha(128)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def voc(name: str, boxes: list[Corners], labels: list[str] | None = None) -> bytes:
    width, height, _ = SIZES[name]
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for (x0, y0, x1, y1), label in zip(boxes, labels or ["Tree"] * len(boxes), strict=True)
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>".encode()


def members() -> dict[str, bytes]:
    files = {}
    for names in tree_crowns.SPLITS.values():
        for name in names:
            boxes = random_boxes(name)
            labels = ["Dead" if i % 2 else "Alive" for i in range(len(boxes))] if name == "SOAP_061" else None
            files[f"{tree_crowns.MEMBER_FOLDER}/{name}.png"] = png(name)
            files[f"{tree_crowns.MEMBER_FOLDER}/{name}.xml"] = voc(name, boxes, labels)
    info = "deepforest-2.1.0.dist-info"
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: deepforest\nVersion: 2.1.0\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = b""
    return files


def write_wheel(folder: Path, files: dict[str, bytes] | None = None) -> tuple[Path, common.PinnedWheel]:
    """Writes the wheel into `folder` and pins it by its content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILENAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (files if files is not None else members()).items():
            archive.writestr(zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0)), content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, common.PinnedWheel(filename=FILENAME, sha256=digest)
