"""The check to run before a training: a config against its data, every loader, head and evaluator at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..config import load_config
from .checks import OTHER_COUNTS, CheckLevel, Problem, check_annotation_file, examples

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = ["check_config", "check_dataset"]

CHECKED_TYPE = "castling_det.CheckedCocoDataset"


def check_dataset(
    source: str | os.PathLike[str] | Config,
    *,
    classes: Sequence[str] | None = None,
    image_root: str | os.PathLike[str] | None = None,
    level: CheckLevel = "headers",
) -> list[Problem]:
    """Everything that would stop a training or silently spoil it, errors first.

    A config is checked as a whole: the annotation file, classes and images of every loader, `num_classes` of every
    head, the evaluators' files, and whether they agree. Nothing is built.

    Args:
        source: a config (`.py` file or mmengine `Config`), or a COCO annotation file (`.json`).
        classes, image_root: expected names, and folder of the images, of a COCO file; a config has its own.
        level: `"names"` looks whether the images are there, `"headers"` at their sizes and formats as well, `"pixels"`
            decodes them all.

    Raises:
        ValueError: an unknown `level`, a config that cannot be read, or arguments that a config does not take.
    """
    if level not in get_args(CheckLevel):
        raise ValueError(f"level={level!r}: expected one of {', '.join(map(repr, get_args(CheckLevel)))}")
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".json":
        return check_annotation_file(source, classes=classes, image_root=image_root, level=level)
    if classes is not None or image_root is not None:
        raise ValueError("classes and image_root are for a COCO .json file; a config names its own")
    return check_config(load_config(source), level=level)


@dataclass(frozen=True)
class _Source:
    """One COCO data set of a config, its paths put together as mmengine does."""

    field: str  # such as `train_dataloader.dataset`
    ann_file: str
    classes: tuple[str, ...] | None
    image_root: str | None  # None: the images are not looked at
    need_boxes: bool
    skip: bool  # its files are remote, or checked elsewhere


def check_config(
    config: Mapping[str, Any], *, level: CheckLevel = "headers", trust_checked: bool = False
) -> list[Problem]:
    """As `check_dataset`, of a loaded config. `trust_checked`: skip files that `CheckedCocoDataset` checks itself."""
    problems: list[Problem] = []
    sources = [
        source
        for name in ("train_dataloader", "val_dataloader", "test_dataloader")
        for loader in _list(config, name)
        for source in _sources(loader.get("dataset"), f"{name}.dataset", trust_checked, problems)
    ]
    seen = set()
    for source in sources:
        if (key := replace(source, field="")) not in seen and not source.skip:
            problems += _source_problems(source, level)
        seen.add(key)
    problems += _disagreements(config, sources)
    problems += _evaluators(config, sources)
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.severity != "error")


def _list(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The settings under `key`: none, one or several."""
    value = config.get(key)
    return [entry for entry in (value if isinstance(value, list | tuple) else [value]) if isinstance(entry, Mapping)]


def _sources(dataset: Any, field: str, trust: bool, problems: list[Problem]) -> Iterator[_Source]:
    """The COCO data sets of a loader, also inside of RepeatDataset, ConcatDataset and their like."""
    if not isinstance(dataset, Mapping):
        return
    if inner := [key for key in ("dataset", "datasets") if key in dataset]:
        for key in inner:
            for number, entry in enumerate(_list(dataset, key)):
                index = f"[{number}]" if isinstance(dataset[key], list | tuple) else ""
                yield from _sources(entry, f"{field}.{key}{index}", trust, problems)
        return
    kind, root = str(dataset.get("type", "")), str(dataset.get("data_root") or "")

    ann_file = os.path.join(root, str(dataset.get("ann_file") or ""))
    remote = dataset.get("backend_args") is not None or "://" in ann_file
    for key, applies, what in (
        ("type", "Coco" not in kind, f"{kind!r} is no COCO data set; it was not checked."),
        ("backend_args", remote, "the files are not on a local disk; they were not checked."),
    ):
        if applies:
            problems.append(Problem("warning", f"{field}.{key}", what, "check it by hand, in a local copy."))
    if "Coco" not in kind:
        return
    images = os.path.join(root, str((dataset.get("data_prefix") or {}).get("img", "")))
    yield _Source(
        field,
        ann_file=ann_file,
        classes=_classes(dataset, kind),
        image_root=images if dataset.get("check_files", True) else None,
        need_boxes=not dataset.get("test_mode", False),
        skip=remote or (trust and kind == CHECKED_TYPE),
    )


def _classes(dataset: Mapping[str, Any], kind: str) -> Any:
    """The classes that the config names, or those of the data set's class, such as COCO's 80."""
    from mmengine.registry import DATASETS

    classes = (dataset.get("metainfo") or {}).get("classes")
    if classes is None:
        found = DATASETS.get(kind) if "." in kind else DATASETS.get(f"mmdet.{kind}")
        classes = getattr(found, "METAINFO", {}).get("classes")
    # A text or a number is left for check_classes to name.
    return tuple(classes) if isinstance(classes, list | tuple) else classes


def _source_problems(source: _Source, level: CheckLevel) -> Iterator[Problem]:
    for problem in check_annotation_file(
        source.ann_file,
        classes=source.classes,
        image_root=source.image_root,
        need_boxes=source.need_boxes,
        level=level,
    ):
        inside = problem.field.removeprefix("dataset.")
        place = inside if inside != problem.field else f"ann_file: {inside}"
        yield replace(problem, field=f"{source.field}.{place}")


def _disagreements(config: Mapping[str, Any], sources: Sequence[_Source]) -> Iterator[Problem]:
    """Loaders or heads with other classes than the first loader's."""
    if not sources:
        return
    first = sources[0]
    for source in sources[1:]:
        if source.classes != first.classes:
            message = f"names {_names(source.classes)}, but {first.field} {_names(first.classes)}."
            fix = f"give every loader the same metainfo: `metainfo = dict(classes={first.classes!r})`."
            yield Problem("error", f"{source.field}.metainfo['classes']", message, fix)
    expected = len(first.classes) if isinstance(first.classes, tuple) else None
    for field, count in _counts(config.get("model"), "model"):
        if expected not in (None, count):
            message = f"is {count}, but {first.field}.metainfo['classes'] names {expected} ({_names(first.classes)})."
            fix = f"write num_classes={expected} there, or correct the classes in metainfo."
            yield Problem("error", field, message, fix)


def _names(classes: Any) -> str:
    return examples(classes) if isinstance(classes, tuple) else repr(classes)


def _counts(part: Any, field: str) -> Iterator[tuple[str, int]]:
    """Every `num_classes` of a model's config that counts detected classes, with its place."""
    if isinstance(part, Mapping):
        if type(count := part.get("num_classes")) is int:
            yield f"{field}.num_classes", count
        for key, value in part.items():
            if key not in OTHER_COUNTS:
                yield from _counts(value, f"{field}.{key}")
    elif isinstance(part, list | tuple):
        for number, value in enumerate(part):
            yield from _counts(value, f"{field}[{number}]")


def _evaluators(config: Mapping[str, Any], sources: Sequence[_Source]) -> Iterator[Problem]:
    for stage in ("val", "test"):
        read = [source.ann_file for source in sources if source.field.startswith(f"{stage}_")]
        for file in [metric.get("ann_file") for metric in _list(config, f"{stage}_evaluator")]:
            if not isinstance(file, str) or "://" in file or len(read) != 1 or "://" in read[0]:
                continue
            if os.path.realpath(file) != os.path.realpath(read[0]):
                what = "is another file than" if Path(file).is_file() else "is not a file;"
                message = f"{file} {what} {stage}_dataloader reads {read[0]}."
                fix = f"write {stage}_evaluator = dict(ann_file={read[0]!r})."
                yield Problem("error", f"{stage}_evaluator.ann_file", message, fix)
