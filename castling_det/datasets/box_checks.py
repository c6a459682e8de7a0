"""Checks of a COCO dict's annotations: do they belong to something, can their boxes be learned from?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

from .image_checks import has_id, is_finite
from .problems import Problem, examples

__all__ = ["TOLERATED_SHARE", "check_boxes"]

# Large public data sets hold a few unusable boxes, which the loader leaves out; a larger share is a mistake.
TOLERATED_SHARE = 0.01

_RULES = {
    "no_box": ("have no `bbox` of four finite numbers", "give each a bbox [x, y, width, height] in pixels"),
    "unknown_image": (
        "name an `image_id` that no image has",
        "remove them, or add the images they belong to",
    ),
    "unknown_category": ("name a `category_id` that no category has", "add the category, or correct the ids"),
    "negative": (
        "have a box of negative width or height",
        "write bbox as [x, y, width, height] with x, y the upper left corner",
    ),
    "no_area": ("lack a number in `area`", "set area to width * height (MMDetection's loader reads it)"),
    "empty": ("have a box below one pixel or an `area` of 0, and are left out", "remove or correct them"),
    "outside": (
        "have a box wholly outside their image, and are left out",
        "check the image's width and height",
    ),
    "overhang": (
        "have a box that reaches over the image's edge by more than a pixel",
        "clip them to the image",
    ),
}
_ALWAYS_ERRORS = ("no_box", "unknown_image", "unknown_category", "negative", "no_area")


def _among(identifier: Any, known: Container[Any]) -> bool:
    return isinstance(identifier, int | str) and identifier in known


def _fault(
    annotation: Mapping[str, Any], sizes: Mapping[Any, tuple[float, float] | None], known: set[Any]
) -> str:
    """The key in `_RULES` of the first rule that the annotation breaks, or an empty string."""
    box = annotation.get("bbox")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_finite, box)):
        return "no_box"
    if not _among(annotation.get("image_id"), sizes):
        return "unknown_image"
    if not _among(annotation.get("category_id"), known):
        return "unknown_category"
    x, y, width, height = box
    if width < 0 or height < 0:
        return "negative"
    if not is_finite(annotation.get("area")):
        return "no_area"
    if width < 1 or height < 1 or annotation["area"] <= 0:
        return "empty"
    size = sizes[annotation["image_id"]]
    if size is None:
        return ""
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        return "outside"
    return "overhang" if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1 else ""


def check_boxes(
    annotations: Sequence[Any], sizes: Mapping[Any, tuple[float, float] | None], category_ids: set[Any]
) -> list[Problem]:
    """One problem for each kind of fault, with its count and first ids.

    `sizes` gives the (width, height) in pixels for each image id, None where they are not known.
    """
    mappings = [annotation for annotation in annotations if isinstance(annotation, Mapping)]
    problems = []
    if len(mappings) < len(annotations):
        message = f"{len(annotations) - len(mappings)} entries are no JSON objects."
        problems.append(Problem("error", "annotations", message, "remove them."))
    ids = Counter(annotation["id"] for annotation in mappings if has_id(annotation))
    missing = len(mappings) - ids.total()
    if missing:
        fix = "number the annotations from 1, each id once."
        problems.append(Problem("error", "annotations[].id", f"{missing} annotations have no id.", fix))
    repeated = [identifier for identifier, count in ids.items() if count > 1]
    if repeated:
        fix = "number the annotations from 1, each id once; of two with the same id only one is evaluated."
        problems.append(Problem("error", "annotations[].id", f"not unique: {examples(repeated)}.", fix))

    faulty: dict[str, list[Any]] = {}
    for annotation in mappings:
        if fault := _fault(annotation, sizes, category_ids):
            faulty.setdefault(fault, []).append(annotation.get("id"))
    total = len(mappings)
    for rule, (what, fix) in _RULES.items():
        if rule in faulty:
            found = faulty[rule]
            tolerated = rule not in _ALWAYS_ERRORS and len(found) <= TOLERATED_SHARE * total
            if rule == "overhang":
                tolerated = len(found) <= total / 2
                if not tolerated:
                    fix = (
                        "the boxes look like [x0, y0, x1, y1]; COCO wants [x, y, width, height]: convert them"
                    )
            message = f"{len(found)} of {total} annotations {what}; ids {examples(found)}."
            problems.append(
                Problem("warning" if tolerated else "error", "annotations[].bbox", message, f"{fix}.")
            )
    return problems
