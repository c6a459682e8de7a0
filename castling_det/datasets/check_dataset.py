"""The check to run before a training: from a config or a COCO file, everything that is wrong, with the fix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .check_file import LEVELS, CheckLevel, check_coco_file
from .problems import Problem

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = ["check_dataset"]


def check_dataset(
    source: str | os.PathLike[str] | Config,
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    level: CheckLevel = "headers",
) -> list[Problem]:
    """What would stop a training or silently spoil it, all at once; an empty list if nothing is wrong.

    A config is checked as a whole: the annotation file, classes and images of every loader, `num_classes` of every
    head, the evaluators' files, and whether they agree. Nothing is built and nothing is trained.

    Args:
        source: a config (`.py` file or mmengine `Config`), or a COCO annotation file (`.json`).
        classes: names that a COCO file is expected to have; a config has its own.
        image_root: folder of a COCO file's images; a config has its own.
        level: of the images, `"names"` looks whether they are there, `"headers"` at their sizes and formats as well,
            `"pixels"` decodes them all.

    Returns:
        Problems, errors first; each has `severity`, `field`, `message` and `fix`.

    Raises:
        ValueError: an unknown `level`, a config that cannot be read, or arguments that a config does not take.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(map(repr, LEVELS))}")
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".json":
        return check_coco_file(source, classes=classes, image_root=image_root, level=level)
    if classes is not None or image_root is not None:
        raise ValueError("classes and image_root are for a COCO .json file; a config names its own")
    from .config_checks import check_config

    return check_config(_config(source), level=level)


def _config(source: str | os.PathLike[str] | Config) -> Config:
    from mmengine.config import Config

    if isinstance(source, Config):
        return source
    if not Path(source).is_file():
        raise ValueError(f"{os.fspath(source)}: no such file; expected a config (.py) or a COCO file (.json)")
    try:
        return Config.fromfile(source)
    except Exception as error:  # a config is a program: it fails in any way
        raise ValueError(f"config {os.fspath(source)}: cannot be read: {error}") from error
