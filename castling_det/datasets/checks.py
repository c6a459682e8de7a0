"""Checks of COCO annotations and of the config fields that must agree with them, before training starts.

MMDetection itself meets most of these late and far from their cause: wrong class names, for one, end as "need
at least one array to concatenate". Nothing here needs MMDetection. The `check_*` functions on data return
what they found and leave raising to `raise_for_problems`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .box_checks import check_boxes
from .image_checks import check_images, has_id, image_sizes
from .problems import Problem, examples, raise_for_problems

__all__ = [
    "OTHER_COUNTS",
    "Problem",
    "check_annotation_file",
    "check_annotations",
    "check_classes",
    "check_num_classes",
    "raise_for_problems",
    "read_annotations",
]

CLASSES_FIELD = "dataset.metainfo['classes']"
# Modules whose num_classes counts something else than the detected classes.
OTHER_COUNTS = ("backbone", "rpn_head", "semantic_head", "data_preprocessor")


class _Module(Protocol):
    def named_modules(self) -> Iterable[tuple[str, Any]]: ...


def check_annotation_file(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    need_boxes: bool = True,
) -> list[Problem]:
    """Reads a JSON file and checks it with `check_annotations`; an unreadable file is a problem too."""
    data = read_annotations(path)
    if isinstance(data, Problem):
        return [data]
    return check_annotations(data, classes=classes, image_root=image_root, need_boxes=need_boxes)


def read_annotations(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file, or the Problem that keeps it from being read."""
    source = Path(path)

    def unreadable(message: str, fix: str) -> Problem:
        return Problem("error", "dataset.ann_file", f"{source} {message}", fix)

    if not source.is_file():
        fix = "correct data_root and ann_file; a relative ann_file is looked up under data_root."
        return unreadable("is not a file.", fix)
    if source.stat().st_size == 0:
        fix = "write it again: a COCO file is a JSON object with images, annotations and categories."
        return unreadable("is empty (0 bytes).", fix)
    try:
        return json.loads(source.read_bytes())
    except RecursionError:
        fix = "a COCO file is an object of lists of objects; get it from its source again."
        return unreadable("holds containers inside one another, hundreds deep.", fix)
    except ValueError as error:
        fix = "the file is damaged, incomplete or of another format; write or copy it again."
        return unreadable(f"is not JSON ({error}).", fix)


def check_annotations(
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    need_boxes: bool = True,
) -> list[Problem]:
    """Everything that is wrong with a COCO dict, errors first.

    `classes` are those of the config's metainfo; None leaves them unchecked. `image_root` is the folder that
    `file_name` is relative to; None leaves the files unchecked. With `need_boxes` a dict without any
    annotation is an error; single images without boxes always pass.
    """
    if not isinstance(data, Mapping):
        fix = "ann_file must be a COCO object with the keys images, annotations and categories."
        return [Problem("error", "dataset.ann_file", f"holds a JSON {type(data).__name__}, no object.", fix)]
    problems = []
    lists: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        value = data.get(key)
        lists[key] = value if isinstance(value, list) else []
        if value is not None and not isinstance(value, list):
            message = f"is a {type(value).__name__}, expected a list."
        elif value or (key == "annotations" and not need_boxes):
            continue
        else:
            message = "is missing." if value is None else "is empty: there is nothing to learn from."
        fix = "check the export, and that ann_file names the split that was meant."
        problems.append(Problem("error", key, message, fix))
    if lists["images"]:
        problems += check_images(lists["images"], image_root)
    names, category_problems = _category_names(lists["categories"])
    problems += category_problems
    if classes is not None and names:
        problems += check_classes(names, classes)
    if lists["annotations"] and lists["images"] and lists["categories"]:
        ids = {entry["id"] for entry in lists["categories"] if has_id(entry)}
        problems += check_boxes(lists["annotations"], image_sizes(lists["images"]), ids)
    return sorted(problems, key=lambda problem: problem.severity != "error")


def _category_names(categories: Sequence[Any]) -> tuple[list[str], list[Problem]]:
    """Category names in file order, and what is wrong with them."""
    problems = []
    valid = [entry for entry in categories if has_id(entry) and isinstance(entry.get("name"), str)]
    if len(valid) < len(categories):
        message = f"{len(categories) - len(valid)} of {len(categories)} entries lack an id or a name."
        problems.append(Problem("error", "categories[]", message, 'write {"id": 1, "name": "..."}.'))
    for key in ("id", "name"):
        repeated = [value for value, count in Counter(entry[key] for entry in valid).items() if count > 1]
        if repeated:
            fix = f"give every category its own {key}."
            problem = Problem("error", f"categories[].{key}", f"not unique: {examples(repeated)}.", fix)
            problems.append(problem)
    return [entry["name"] for entry in valid], problems


def check_classes(names: Sequence[str], classes: object) -> list[Problem]:
    """Category names of an annotation file, in its order, against `metainfo['classes']`.

    MMDetection numbers labels in the order of the file, so another order in `classes` shows wrong names.
    Categories that `classes` leaves out are a warning only: one may train on some of a file's categories.
    """
    fix = (
        f"write `metainfo = dict(classes={tuple(names)!r})`, give it to the dataset of train_dataloader, "
        f"val_dataloader and test_dataloader, and write num_classes={len(names)} in the model's head."
    )

    def error(message: str) -> list[Problem]:
        return [Problem("error", CLASSES_FIELD, message, fix)]

    if isinstance(classes, str):
        return error(f"is the text {classes!r}, expected a tuple of names; a tuple of one needs a comma.")
    if not isinstance(classes, Sequence) or not all(isinstance(name, str) for name in classes):
        return error(f"is {classes!r}, expected a tuple of names.")
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        return error(f"names a class twice: {examples(repeated)}.")
    absent = [name for name in classes if name not in names]
    unused = [name for name in names if name not in classes]
    if absent:
        return error(
            f"{len(absent)} of its {len(classes)} names are no category of the annotation file: "
            f"{examples(absent)}. {_categories_of_file(absent, unused, names)}"
        )
    if unused:
        message = f"leaves out the file's categories {examples(unused)}; their boxes are not trained on."
        return [Problem("warning", CLASSES_FIELD, message, f"if they should be: {fix}")]
    if list(classes) != list(names):
        message = (
            f"has the file's names in another order ({examples(classes)}); labels follow the file's order."
        )
        return error(message)
    return []


def _categories_of_file(absent: Sequence[str], unused: Sequence[str], names: Sequence[str]) -> str:
    text = f"The file has {examples(names, 10)}"
    if unused:
        text += f", of which metainfo lacks {examples(unused)}"
    folded = {name.strip().casefold(): name for name in unused}
    for name in absent:
        if name.strip().casefold() in folded:
            text += f"; {name!r} and {folded[name.strip().casefold()]!r} differ in case or space only"
    return f"{text}."


def check_num_classes(model: _Module, metainfo: Mapping[str, Any]) -> None:
    """Raises ValueError if a head of `model` does not count as many classes as `metainfo['classes']` names.

    Every module with an integer `num_classes` is compared, except those that count something else (a
    backbone's classifier, a region proposal network, a semantic branch). MMDetection's NumClassCheckHook does
    nearly this, but its default runtime does not turn it on, it names no config field, and it takes a
    backbone's classifier for a head.
    """
    classes = metainfo.get("classes")
    if classes is None:
        return
    if isinstance(classes, str):
        line = f"metainfo = dict(classes=({classes!r},))"
        raise ValueError(
            f"{CLASSES_FIELD} is the text {classes!r}, expected a tuple of names: write `{line}`."
        )
    wrong = []
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part not in ("", "module")]
        count = getattr(module, "num_classes", None)
        if not parts or type(count) is not int or any(part in OTHER_COUNTS for part in parts):
            continue
        if count != len(classes):
            field = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)
            wrong.append(f"  model{field}.num_classes={count} ({type(module).__name__})")
    if wrong:
        listed = "\n".join(wrong)
        raise ValueError(
            f"The model and the data disagree: {CLASSES_FIELD} names {len(classes)} "
            f"({examples(list(classes))}), but\n{listed}\n"
            f"  fix: write num_classes={len(classes)} there, or correct the classes in metainfo."
        )
