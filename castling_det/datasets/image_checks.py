"""Checks of the images of a COCO dict: ids, sizes, names, and whether the files are there."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from .problems import Problem, examples

__all__ = ["check_images", "has_id", "image_sizes", "is_finite", "leaves"]

_NUMBERING = "number the images from 1, each id once."


def has_id(entry: Any) -> bool:
    """Whether `entry` is a JSON object with an id that can be looked up."""
    return isinstance(entry, Mapping) and isinstance(entry.get("id"), int | str)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float holds; JSON has NaN, infinity and integers of any length."""
    if type(value) is not int and type(value) is not float:
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def image_sizes(images: Sequence[Any]) -> dict[Any, tuple[float, float] | None]:
    """(width, height) in pixels by image id; None where they are missing or not positive."""

    def size(image: Mapping[str, Any]) -> tuple[float, float] | None:
        width: Any = image.get("width")
        height: Any = image.get("height")
        if not is_finite(width) or not is_finite(height):
            return None
        return (width, height) if width > 0 and height > 0 else None

    return {image["id"]: size(image) for image in images if has_id(image)}


def check_images(images: Sequence[Any], image_root: str | os.PathLike[str] | None = None) -> list[Problem]:
    """One problem for each kind of fault.

    `image_root` is the folder in which the files must be; None leaves them unchecked.
    """
    found: list[tuple[str, str, str]] = []
    mappings = [image for image in images if has_id(image)]
    if len(mappings) < len(images):
        numbers = [number for number, image in enumerate(images) if not has_id(image)]
        found.append(("images[].id", f"entries {examples(numbers)} have no id.", _NUMBERING))
    repeated = [key for key, count in Counter(image["id"] for image in mappings).items() if count > 1]
    if repeated:
        found.append(("images[].id", f"not unique: {examples(repeated)}.", _NUMBERING))
    unsized = [key for key, size in image_sizes(mappings).items() if size is None]
    if unsized:
        message = f"no positive numbers in images {examples(unsized)}."
        found.append(("images[].width/height", message, "write the image's size in pixels."))
    unnamed = [image["id"] for image in mappings if not isinstance(image.get("file_name"), str)]
    if unnamed:
        message = f"is no text in images {examples(unnamed)}."
        found.append(("images[].file_name", message, "write the name of the image file."))
    names = [image["file_name"] for image in mappings if isinstance(image.get("file_name"), str)]
    inside = [name for name in names if not leaves(name)]
    if len(inside) < len(names):
        message = f"leads out of the image folder: {examples([name for name in names if leaves(name)])}."
        fix = "write names relative to data_root + data_prefix['img'], and set these two to the right folder."
        found.append(("images[].file_name", message, fix))
    missing = _missing(inside, Path(image_root)) if image_root is not None else []
    if missing:
        message = (
            f"{len(missing)} of {len(names)} image files are not under {image_root}: {examples(missing)}."
        )
        fix = "correct data_root and data_prefix=dict(img=...), or put the files there."
        found.append(("dataset.data_prefix['img']", message, fix))
    return [Problem("error", *entry) for entry in found]


def leaves(name: str) -> bool:
    """Whether a file name leads out of the folder that it is relative to."""
    # A plain name, by far the most frequent, needs no path arithmetic.
    if ".." not in name and not name.startswith(("/", "\\")) and ":" not in name:
        return False
    return PurePath(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == ".."


def _missing(names: Sequence[str], root: Path) -> list[str]:
    # One listing for each folder: much quicker than a look-up for each file, above all over a network.
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(root / folder))
            except (OSError, ValueError):  # the latter for a NUL in the name
                listed[folder] = set()
        if file not in listed[folder]:
            missing.append(name)
    return missing
