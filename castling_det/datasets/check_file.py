"""One COCO file with its images, read once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from .checks import check_annotations, read_annotations
from .pixel_checks import check_pixels
from .problems import Problem

__all__ = ["LEVELS", "CheckLevel", "check_coco_file"]

CheckLevel = Literal["names", "headers", "pixels"]
LEVELS: tuple[CheckLevel, ...] = ("names", "headers", "pixels")


def check_coco_file(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    need_boxes: bool = True,
    level: CheckLevel = "headers",
) -> list[Problem]:
    """Everything that is wrong with a COCO file and its images, errors first.

    Args:
        path: the JSON file.
        classes: as the config names them; None leaves them unchecked.
        image_root: folder of the images; None leaves them unchecked.
        need_boxes: whether a file without any annotation is an error.
        level: of the images, `"names"` looks whether they are there, `"headers"` at their sizes and formats as well,
            `"pixels"` decodes them all.
    """
    data = read_annotations(path)
    if isinstance(data, Problem):
        return [data]
    problems = check_annotations(data, classes=classes, image_root=image_root, need_boxes=need_boxes)
    images = data.get("images") if isinstance(data, dict) else None
    if level != "names" and image_root is not None and isinstance(images, list):
        problems += check_pixels(images, image_root, decode=level == "pixels")
    return sorted(problems, key=lambda problem: problem.severity != "error")
