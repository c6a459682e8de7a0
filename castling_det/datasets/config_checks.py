"""Checks of a whole config against its data: every loader, the head's classes and the evaluators, all at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .check_file import CheckLevel, check_coco_file
from .checks import OTHER_COUNTS
from .problems import Problem, examples

__all__ = ["CHECKED_TYPE", "check_config"]

CHECKED_TYPE = "castling_det.CheckedCocoDataset"
_STAGES = ("train", "val", "test")
_WRAPPERS = ("dataset", "datasets")


@dataclass(frozen=True)
class _Source:
    """One COCO data set of a config, its paths put together as mmengine does."""

    field: str
    """Such as `train_dataloader.dataset`."""
    type: str
    ann_file: str
    image_root: str
    classes: tuple[str, ...] | None
    test_mode: bool
    local: bool
    checks_files: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for sources that would have the same problems."""
        return self.ann_file, self.image_root, self.classes, self.test_mode, self.checks_files


def check_config(
    config: Mapping[str, Any], *, level: CheckLevel = "headers", trust_checked: bool = False
) -> list[Problem]:
    """Everything in which a config and its data disagree, errors first; each problem names the config's field.

    Args:
        config: an mmengine `Config`, or its dict.
        level: as in `castling_det.check_dataset`.
        trust_checked: do not read what `CheckedCocoDataset` reads and checks itself.
    """
    problems: list[Problem] = []
    sources = list(_sources(config, problems))
    seen: dict[tuple[Any, ...], str] = {}
    for source in sources:
        if source.key in seen:
            continue
        seen[source.key] = source.field
        problems += _source_problems(source, level, trust_checked and source.type == CHECKED_TYPE)
    problems += _disagreements(sources)
    problems += _class_counts(config, sources)
    problems += _evaluators(config, sources)
    return sorted(dict.fromkeys(problems), key=lambda problem: problem.severity != "error")


def _sources(config: Mapping[str, Any], problems: list[Problem]) -> Iterator[_Source]:
    for stage in _STAGES:
        loader = config.get(f"{stage}_dataloader")
        for entry in loader if isinstance(loader, Sequence) else [loader]:
            if isinstance(entry, Mapping) and isinstance(entry.get("dataset"), Mapping):
                yield from _unwrapped(entry["dataset"], f"{stage}_dataloader.dataset", problems)


def _unwrapped(dataset: Mapping[str, Any], field: str, problems: list[Problem]) -> Iterator[_Source]:
    """The data sets inside of RepeatDataset, ConcatDataset, MultiImageMixDataset and their like."""
    inner = [(key, dataset[key]) for key in _WRAPPERS if key in dataset]
    for key, value in inner:
        for number, entry in enumerate(value if isinstance(value, Sequence) else [value]):
            index = f"[{number}]" if isinstance(value, Sequence) else ""
            if isinstance(entry, Mapping):
                yield from _unwrapped(entry, f"{field}.{key}{index}", problems)
    if inner:
        return
    kind = str(dataset.get("type", ""))
    if "Coco" not in kind:
        message = f"{kind!r} is no COCO data set; it was not checked."
        problems.append(Problem("warning", f"{field}.type", message, "check it by hand."))
        return
    yield _source(dataset, field, kind)


def _source(dataset: Mapping[str, Any], field: str, kind: str) -> _Source:
    root = str(dataset.get("data_root") or "")
    prefix = (dataset.get("data_prefix") or {}).get("img", "")
    metainfo = dataset.get("metainfo") or {}
    classes = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
    remote = "://" in root or "://" in str(dataset.get("ann_file", ""))
    return _Source(
        field=field,
        type=kind,
        ann_file=os.path.join(root, str(dataset.get("ann_file") or "")),
        image_root=os.path.join(root, str(prefix)),
        classes=_class_names(classes) if classes is not None else _default_classes(kind),
        test_mode=bool(dataset.get("test_mode", False)),
        local=dataset.get("backend_args") is None and not remote,
        checks_files=bool(dataset.get("check_files", True)),
    )


def _class_names(classes: Any) -> Any:
    # A text or a number is left for check_classes to name.
    return tuple(classes) if isinstance(classes, list | tuple) else classes


def _default_classes(kind: str) -> tuple[str, ...] | None:
    """What the data set's class itself says, such as COCO's 80."""
    from mmengine.registry import DATASETS

    found = DATASETS.get(kind) if "." in kind else DATASETS.get(f"mmdet.{kind}")
    classes = getattr(found, "METAINFO", {}).get("classes")
    return None if classes is None else tuple(classes)


def _source_problems(source: _Source, level: CheckLevel, trusted: bool) -> list[Problem]:
    if not source.local:
        message = "the files are not on a local disk; they were not checked."
        return [Problem("warning", f"{source.field}.backend_args", message, "check a local copy.")]
    if trusted:
        return []
    found = check_coco_file(
        source.ann_file,
        classes=source.classes,
        image_root=source.image_root if source.checks_files else None,
        need_boxes=not source.test_mode,
        level=level,
    )
    return [replace(problem, field=_placed(problem.field, source)) for problem in found]


def _placed(field: str, source: _Source) -> str:
    inside = field.removeprefix("dataset.")
    return f"{source.field}.{inside}" if inside != field else f"{source.field}.ann_file: {field}"


def _disagreements(sources: Sequence[_Source]) -> list[Problem]:
    """Loaders whose classes differ: labels are numbers, so the score would be of other classes."""
    if not sources:
        return []
    first, *others = sources
    return [
        Problem(
            "error",
            f"{source.field}.metainfo['classes']",
            f"names {_listed(source.classes)}, but {first.field} {_listed(first.classes)}.",
            f"give every loader the same metainfo: `metainfo = dict(classes={first.classes!r})`.",
        )
        for source in others
        if source.classes != first.classes
    ]


def _listed(classes: Any) -> str:
    return "none" if classes is None else examples(classes) if isinstance(classes, tuple) else repr(classes)


def _class_counts(config: Mapping[str, Any], sources: Sequence[_Source]) -> list[Problem]:
    classes = next((source.classes for source in sources), None)
    if not isinstance(classes, tuple):
        return []
    return [
        Problem(
            "error",
            field,
            f"is {count}, but {sources[0].field}.metainfo['classes'] names {len(classes)} ({examples(classes)}).",
            f"write num_classes={len(classes)} there, or correct the classes in metainfo.",
        )
        for field, count in _counts(config.get("model"), "model")
        if count != len(classes)
    ]


def _counts(part: Any, field: str) -> Iterator[tuple[str, int]]:
    if isinstance(part, Mapping):
        count = part.get("num_classes")
        if type(count) is int:
            yield f"{field}.num_classes", count
        for key, value in part.items():
            if key not in OTHER_COUNTS:
                yield from _counts(value, f"{field}.{key}")
    elif isinstance(part, list | tuple):
        for number, value in enumerate(part):
            yield from _counts(value, f"{field}[{number}]")


def _evaluators(config: Mapping[str, Any], sources: Sequence[_Source]) -> list[Problem]:
    problems = []
    for stage in _STAGES[1:]:
        read = [source.ann_file for source in sources if source.field.startswith(f"{stage}_") and source.local]
        metrics = config.get(f"{stage}_evaluator")
        for metric in metrics if isinstance(metrics, Sequence) else [metrics]:
            file = metric.get("ann_file") if isinstance(metric, Mapping) else None
            if isinstance(file, str) and "://" not in file and len(read) == 1 and not _same(file, read[0]):
                what = "is another file than" if Path(file).is_file() else "is not a file;"
                problems.append(
                    Problem(
                        "error",
                        f"{stage}_evaluator.ann_file",
                        f"{file} {what} {stage}_dataloader reads {read[0]}.",
                        f"write {stage}_evaluator = dict(ann_file={read[0]!r}).",
                    )
                )
    return problems


def _same(left: str, right: str) -> bool:
    return os.path.realpath(left) == os.path.realpath(right)
