"""Checks of the image files themselves: can they be read, and do they show what the annotations say?

MMDetection's loader turns photographs by their EXIF orientation and keeps the upper 8 of 16 bits without a word, and a
file that it cannot decode ends a training in whichever hour the file's turn comes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .image_checks import image_sizes, leaves
from .problems import Problem, Severity, examples

__all__ = ["MAX_PIXELS", "check_pixels"]

MAX_PIXELS = 178_956_970
"""Of one image: beyond that Pillow refuses to decode, and a data loader's worker takes gigabytes."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
# OpenCV, which loads the images, applies the tag in these formats alone.
_ORIENTED = ("JPEG", "MPO", "TIFF")
_SIXTEEN_BITS = "I;16"
_THIRTY_TWO_BITS = ("I", "F")

_RULES: dict[str, tuple[Severity, str, str, str]] = {
    "unreadable": (
        "error",
        "images[].file_name",
        "are no images that can be read",
        "write the files again, or remove them from the annotations",
    ),
    "truncated": (
        "error",
        "images[].file_name",
        "are truncated or damaged, and would end the training when their turn comes",
        "get the files again",
    ),
    "huge": (
        "error",
        "images[].file_name",
        f"have more than {MAX_PIXELS} pixels",
        "cut them into tiles (castling_det.datasets.tiling)",
    ),
    "words": (
        "error",
        "images[].file_name",
        "have 32 bits a channel, which the loader cannot read",
        "write them with 8 bits",
    ),
    "turned": (
        "error",
        "images[].width/height",
        "are turned by their EXIF orientation when they are loaded, so that their boxes lie elsewhere",
        "save the files upright, without the tag, or load them with "
        "dict(type='LoadImageFromFile', imdecode_backend='cv2', color_type='color_ignore_orientation')",
    ),
    "size": (
        "error",
        "images[].width/height",
        "have another size than the annotations say",
        "write the files' own width and height; boxes are in the pixels of these",
    ),
    "mirrored": (
        "warning",
        "images[].file_name",
        "have an EXIF orientation, which the loader applies",
        "see that the boxes were drawn on the turned image, or save the files upright, without the tag",
    ),
    "deep": (
        "warning",
        "images[].file_name",
        "have 16 bits a channel, of which the loader keeps the upper 8",
        "stretch them to 8 bits first if they are dark",
    ),
    "cmyk": (
        "warning",
        "images[].file_name",
        "are CMYK, which the loader brings to RGB without the file's colour profile",
        "convert them to RGB",
    ),
}


def check_pixels(images: Sequence[Any], root: str | os.PathLike[str], *, decode: bool = False) -> list[Problem]:
    """One problem for each kind of fault, with its count and first files; files that are missing are left out.

    Args:
        images: the `images` of a COCO dict.
        root: folder that `file_name` is relative to.
        decode: read every pixel, which finds truncated files; otherwise only the headers (a tenth of a millisecond
            each).
    """
    sizes = image_sizes(images)
    faulty: dict[str, list[str]] = {}
    for image in images:
        name = image.get("file_name") if isinstance(image, Mapping) else None
        if not isinstance(name, str) or "\0" in name or leaves(name) or not (Path(root) / name).is_file():
            continue
        if fault := _fault(Path(root) / name, sizes.get(image.get("id")), decode):
            faulty.setdefault(fault, []).append(name)
    problems = []
    for rule, (severity, field, what, fix) in _RULES.items():
        if rule in faulty:
            message = f"{len(faulty[rule])} of {len(images)} files {what}: {examples(faulty[rule])}."
            problems.append(Problem(severity, field, message, f"{fix}."))
    return problems


def _fault(path: Path, size: tuple[float, float] | None, decode: bool) -> str:
    """The key in `_RULES` of the first rule that the file breaks, or an empty string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and damaged metadata; the rules say more
            with Image.open(path) as image:
                found = _header_fault(image, size)
                if decode and found not in ("huge", "unreadable"):
                    image.load()
    except Image.DecompressionBombError:
        return "huge"
    except (UnidentifiedImageError, FileNotFoundError):
        return "unreadable"
    except Exception:  # decoders fail in many ways
        return "truncated" if decode else "unreadable"
    return found


def _header_fault(image: Image.Image, size: tuple[float, float] | None) -> str:
    if image.width * image.height > MAX_PIXELS:
        return "huge"
    if image.mode in _THIRTY_TWO_BITS:
        return "words"
    orientation = image.getexif().get(_ORIENTATION, 1) if image.format in _ORIENTED else 1
    shown = (image.height, image.width) if orientation in _TURNED else image.size
    if size is not None and tuple(size) != shown:
        return "turned" if tuple(size) == image.size else "size"
    if orientation != 1:
        return "mirrored"
    if image.mode.startswith(_SIXTEEN_BITS):
        return "deep"
    return "cmyk" if image.mode == "CMYK" else ""
