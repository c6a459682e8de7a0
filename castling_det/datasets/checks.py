"""Checks of COCO annotations, of their images, and of the classes that must agree with them, before training starts.

Nothing here needs MMDetection. What passes without an error can be loaded and evaluated.
"""

from __future__ import annotations

import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta
from PIL import Image

__all__ = [
    "Problem",
    "check_annotation_file",
    "check_annotations",
    "check_classes",
    "check_num_classes",
    "raise_for_problems",
]

Severity = Literal["error", "warning"]
CheckLevel = Literal["names", "headers", "pixels"]
CLASSES_FIELD = "dataset.metainfo['classes']"
# Modules whose num_classes counts something else than the detected classes.
OTHER_COUNTS = ("backbone", "rpn_head", "semantic_head", "data_preprocessor")
MAX_PIXELS = 178_956_970
"""Of one image: beyond that Pillow refuses to decode, and a data loader's worker takes gigabytes."""

# By rule: the share up to which breaking it is only a warning, what is wrong, and the fix.
_Rules: TypeAlias = Mapping[str, tuple[float, str, str]]

# What a file holds may be nested, or megabytes long.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the data or its config.

    An "error" would stop training or silently spoil it; a "warning" is something that the loader leaves out or changes.
    `field` is the config's, or a place in the annotation file.
    """

    severity: Severity
    field: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.field}: {self.message}\n    fix: {self.fix}"


def examples(values: Sequence[object], limit: int = 5) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(_SHORT.repr(value) for value in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def raise_for_problems(problems: Iterable[Problem], *, source: str = "the annotations") -> None:
    """Raises one ValueError that lists every error in `problems`; warnings alone raise nothing."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ValueError(f"{source}: {count} to solve first.\n" + "\n".join(f"  {error}" for error in errors))


def _tally(field: str, noun: str, faulty: Mapping[str, Sequence[object]], rules: _Rules, total: int) -> list[Problem]:
    """One problem for each rule that something breaks, with their number and the first of them."""
    problems = []
    for rule, (tolerated, what, fix) in rules.items():
        if found := faulty.get(rule):
            severity: Severity = "warning" if len(found) <= tolerated * total else "error"
            message = f"{len(found)} of {total} {noun} {what}: {examples(found)}."
            problems.append(Problem(severity, field, message, f"{fix}."))
    return problems


# The shape of a COCO file. An annotation's id is a number and `iscrowd` is there: COCO's evaluation needs both.
_Pixels = Annotated[float, Meta(ge=-1e9, le=1e9)]
_Size = Annotated[float, Meta(gt=0, le=1e9)]


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    width: _Size
    height: _Size


class _Category(msgspec.Struct):
    id: int | str
    name: str


class _Annotation(msgspec.Struct):
    id: int
    image_id: int | str
    category_id: int | str
    bbox: tuple[_Pixels, _Pixels, _Pixels, _Pixels]
    area: _Pixels
    iscrowd: bool | Annotated[int, Meta(ge=0, le=1)]


_Entry = TypeVar("_Entry", _Image, _Category, _Annotation)
_EXAMPLES = {
    "images": '{"id": 1, "file_name": "1.png", "width": 640, "height": 480}',
    "categories": '{"id": 1, "name": "tree"}',
    "annotations": '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}',
}


def check_annotation_file(path: str | os.PathLike[str], **options: Any) -> list[Problem]:
    """`check_annotations` of a JSON file, with the same options; a file that cannot be read is one problem."""
    source = Path(path)
    if not source.is_file():
        fix = "correct data_root and ann_file; a relative ann_file is looked up under data_root."
        return _unreadable(f"{source} is not a file.", fix)
    try:
        data = msgspec.json.decode(source.read_bytes())
    except RecursionError:
        message = f"{source} holds containers hundreds deep."
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f"{source} is not JSON in UTF-8 without a byte order mark ({error})."
    else:
        return check_annotations(data, **options)
    return _unreadable(message, "the file is damaged, incomplete or in another format; write or copy it again.")


def _unreadable(message: str, fix: str) -> list[Problem]:
    return [Problem("error", "dataset.ann_file", message, fix)]


def check_annotations(
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    need_boxes: bool = True,
    level: CheckLevel = "names",
) -> list[Problem]:
    """Everything that is wrong with the content of a COCO file and with its images, errors first.

    Args:
        data: the value of the JSON file.
        classes, image_root: the config's class names, and the folder of the images; None leaves them unchecked.
        need_boxes: whether a file without any annotation is an error; single images without boxes always pass.
        level: as in `check_dataset`.
    """
    if not isinstance(data, Mapping):
        fix = "ann_file must be a COCO object with the keys images, annotations and categories."
        return _unreadable(f"holds a JSON {type(data).__name__}, expected an object.", fix)
    problems: list[Problem] = []
    images = _entries(data, "images", _Image, problems)
    categories = _entries(data, "categories", _Category, problems)
    annotations = _entries(data, "annotations", _Annotation, problems, may_be_empty=not need_boxes)
    names = [category.name for category in categories]
    problems += _repetitions("categories[].name", names)
    if classes is not None and names:
        problems += check_classes(names, classes)
    problems += _check_files(images, None if image_root is None else Path(image_root), level)
    if images and categories:
        sizes = dict.fromkeys(_ids(data["images"])) | {image.id: (image.width, image.height) for image in images}
        problems += _check_boxes(annotations, sizes, _ids(data["categories"]))
    return sorted(problems, key=lambda problem: problem.severity != "error")


def _ids(entries: Iterable[Any]) -> set[int | str]:
    return {entry["id"] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("id"), int | str)}


def _entries(
    data: Mapping[str, Any], key: str, kind: type[_Entry], problems: list[Problem], *, may_be_empty: bool = False
) -> list[_Entry]:
    """The entries of one list that have the right shape; what is wrong with the list is added to `problems`."""
    entries = data.get(key)
    if not isinstance(entries, list) or (not entries and not may_be_empty):
        if entries is not None or not may_be_empty:
            found = "missing" if entries is None else "empty" if entries == [] else f"a {type(entries).__name__}"
            fix = "check the export, and that ann_file names the split that was meant."
            problems.append(Problem("error", key, f"is {found}, expected a list of objects.", fix))
        return []
    valid: list[_Entry] = []
    faults: dict[tuple[str, str], list[int]] = {}
    for number, entry in enumerate(entries):
        try:
            valid.append(msgspec.convert(entry, kind))
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$")
            faults.setdefault((path.strip("`").partition("[")[0], text), []).append(number)
    for (path, text), numbers in faults.items():
        message = f"{len(numbers)} of {len(entries)} entries: {text}; see {key}[{numbers[0]}]."
        problems.append(Problem("error", f"{key}[]{path}", message, f"write {_EXAMPLES[key]}."))
    problems += _repetitions(f"{key}[].id", [entry.id for entry in valid])
    return valid


def _repetitions(field: str, values: Iterable[int | str]) -> list[Problem]:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    return [Problem("error", field, f"not unique: {examples(repeated)}.", "give each its own.")] if repeated else []


# Large public data sets hold a few unusable boxes, which the loader leaves out; a larger share is a mistake.
_BOX_RULES: _Rules = {
    "image": (0, "name an `image_id` that no image has", "remove them, or add the images they belong to"),
    "category": (0, "name a `category_id` that no category has", "add the category, or correct the ids"),
    "negative": (0, "have a negative width or height", "write bbox as [x, y, width, height], x, y the upper left"),
    "empty": (0.01, "are below one pixel or have an `area` of 0, and are left out", "remove or correct them"),
    "outside": (0.01, "lie wholly outside their image, and are left out", "check the image's width and height"),
    "overhang": (
        0.5,
        "reach over the image's edge by more than a pixel",
        "clip them; if most do, they are probably [x0, y0, x1, y1]: convert them to [x, y, width, height]",
    ),
    "zero": (1, "have the id 0, which COCO's evaluation counts as missed", "number the annotations from 1"),
}


_Sizes: TypeAlias = Mapping[int | str, tuple[float, float] | None]  # by image id; None: not stated


def _check_boxes(annotations: Sequence[_Annotation], sizes: _Sizes, categories: set[int | str]) -> list[Problem]:
    faulty: dict[str, list[int]] = {"zero": [annotation.id for annotation in annotations if annotation.id == 0]}
    for annotation in annotations:
        if fault := _box_fault(annotation, sizes, categories):
            faulty.setdefault(fault, []).append(annotation.id)
    return _tally("annotations[].bbox", "boxes (by id)", faulty, _BOX_RULES, len(annotations))


def _box_fault(annotation: _Annotation, sizes: _Sizes, categories: set[int | str]) -> str | None:
    """The key in `_BOX_RULES` of the first rule that the box breaks."""
    if annotation.image_id not in sizes:
        return "image"
    if annotation.category_id not in categories:
        return "category"
    x, y, width, height = annotation.bbox
    if width < 0 or height < 0:
        return "negative"
    if width < 1 or height < 1 or annotation.area <= 0:
        return "empty"
    right, bottom = sizes[annotation.image_id] or (float("inf"), float("inf"))
    if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        return "outside"
    return "overhang" if x < -1 or y < -1 or x + width > right + 1 or y + height > bottom + 1 else None


# MMDetection's loader turns photographs by their EXIF orientation and keeps the upper 8 of 16 bits without a word.
_FILE_RULES: _Rules = {
    "leaves": (0, "lead out of the image folder", "write names relative to data_root + data_prefix['img']"),
    "unreadable": (0, "are damaged, truncated or no images", "get the files again, or remove their entries"),
    "huge": (0, f"have more than {MAX_PIXELS} pixels", "cut them into tiles"),
    "words": (0, "have 32 bits a channel, which the loader cannot read", "write them with 8 bits"),
    "turned": (
        0,
        "are turned by their EXIF orientation when they are loaded, so that their boxes lie elsewhere",
        "save them upright, without the tag, or give LoadImageFromFile color_type='color_ignore_orientation'",
    ),
    "size": (0, "have another size than the annotations say", "write the files' own width and height"),
    "mirrored": (1, "have an EXIF orientation, which the loader applies", "see that the boxes were drawn on it"),
    "deep": (1, "have 16 bits a channel, of which the loader keeps the upper 8", "stretch them to 8 bits"),
    "cmyk": (1, "are CMYK, and are loaded without the file's colour profile", "convert them to RGB"),
}


def _check_files(images: Sequence[_Image], root: Path | None, level: CheckLevel) -> list[Problem]:
    files_in = cache(
        partial(_files_in, root or Path())
    )  # one listing a folder, much quicker than a look-up for each file
    faulty: dict[str, list[str]] = {}
    for image in images:
        folder, _, file = image.file_name.rpartition("/")
        fault = None
        if os.path.isabs(image.file_name) or os.path.normpath(image.file_name).split(os.sep)[0] == "..":
            fault = "leaves"
        elif root is not None and file not in files_in(folder):
            fault = "missing"
        elif root is not None and level != "names":
            fault = _file_fault(root / image.file_name, image, decode=level == "pixels")
        if fault is not None:
            faulty.setdefault(fault, []).append(image.file_name)
    what = f"are not under {root}, or are folders, pipes or broken links"
    fix = "correct data_root and data_prefix=dict(img=...), or put the files there"
    missing = _tally("dataset.data_prefix['img']", "image files", faulty, {"missing": (0, what, fix)}, len(images))
    return missing + _tally("images[].file_name", "image files", faulty, _FILE_RULES, len(images))


def _files_in(root: Path, folder: str) -> set[str]:
    """Names of the files and of links to files: reading a pipe or a device would never end."""
    files = set()
    with suppress(OSError, ValueError), os.scandir(root / folder) as entries:  # ValueError: a NUL in the name
        for entry in entries:
            with suppress(OSError):  # a loop of links
                if entry.is_file():
                    files.add(entry.name)
    return files


def _file_fault(path: Path, annotated: _Image, decode: bool) -> str | None:
    """The key in `_FILE_RULES` of the first rule that the file breaks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and damaged metadata; the rules say more
            with Image.open(path) as image:
                fault = _header_fault(image, (annotated.width, annotated.height))
                if decode and fault != "huge":
                    image.load()
    except Image.DecompressionBombError:
        return "huge"
    except Exception:  # decoders fail in many ways
        return "unreadable"
    return fault


def _header_fault(image: Image.Image, annotated: tuple[float, float]) -> str | None:
    if image.width * image.height > MAX_PIXELS:
        return "huge"
    if image.mode in ("I", "F"):
        return "words"
    # OpenCV, which loads the images, applies the orientation in these formats alone.
    orientation = image.getexif().get(0x0112, 1) if image.format in ("JPEG", "MPO", "TIFF") else 1
    shown = (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size
    if annotated != shown:
        return "turned" if annotated == image.size else "size"
    if orientation != 1:
        return "mirrored"
    return "deep" if image.mode.startswith("I;16") else "cmyk" if image.mode == "CMYK" else None


def check_classes(names: Sequence[str], classes: object) -> list[Problem]:
    """Category names of an annotation file, in its order, against `metainfo['classes']`.

    MMDetection numbers labels in the order of the file, so another order shows wrong names. Categories that `classes`
    leaves out are only a warning.
    """
    fix = (
        f"write `metainfo = dict(classes={tuple(names)!r})`, give it to the dataset of train_dataloader, "
        f"val_dataloader and test_dataloader, and write num_classes={len(names)} in the model's head."
    )
    message = ""
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        message = f"is {classes!r}, expected a tuple of names; a tuple of one needs a comma."
    elif len(set(classes)) < len(classes):
        message = f"names a class twice: {examples([name for name in classes if classes.count(name) > 1])}."
    elif absent := [name for name in classes if name not in names]:
        message = (
            f"{len(absent)} of its {len(classes)} names are no category of the annotation file: {examples(absent)}. "
            f"The file has {examples(names, 10)}; case and spaces count."
        )
    elif unused := [name for name in names if name not in classes]:
        message = f"leaves out the file's categories {examples(unused)}; their boxes are not trained on."
        return [Problem("warning", CLASSES_FIELD, message, f"if they should be: {fix}")]
    elif list(classes) != list(names):
        message = f"has the file's names in another order ({examples(classes)}); labels follow the file's order."
    return [Problem("error", CLASSES_FIELD, message, fix)] if message else []


def check_num_classes(model: Any, metainfo: Mapping[str, Any]) -> None:
    """Raises ValueError if a head of `model` has not as many classes as `metainfo['classes']` names."""
    classes = metainfo.get("classes")
    if classes is None:
        return
    wrong = []
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part not in ("", "module")]
        count = getattr(module, "num_classes", None)
        if parts and type(count) is int and count != len(classes) and not set(parts) & set(OTHER_COUNTS):
            field = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)
            wrong.append(f"  model{field}.num_classes={count} ({type(module).__name__})")
    if wrong:
        raise ValueError(
            f"The model and the data disagree: {CLASSES_FIELD} names {len(classes)} ({examples(list(classes))}), but\n"
            + "\n".join(wrong)
            + f"\n  fix: write num_classes={len(classes)} there, or correct the classes in metainfo."
        )
