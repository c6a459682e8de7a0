"""COCO files that are built to harm, or damaged: each gets a problem by name, none takes the process down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from castling_det.datasets.checks import check_annotation_file, check_annotations, raise_for_problems
from tests.datasets.test_dataset_checks import CLASSES, sound

DEPTH = 100 * 2**20
"""Bytes of nesting."""


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
@pytest.mark.parametrize("closed", [False, True])
def test_a_hundred_megabytes_of_nesting(tmp_path: Path, bracket: bytes, closed: bool) -> None:
    path = tmp_path / "train.json"
    count = DEPTH // len(bracket)
    path.write_bytes(bracket * count + (b"1" + (b"]" if bracket == b"[" else b"}") * count if closed else b""))
    start = time.process_time()
    (problem,) = check_annotation_file(path)
    assert problem.severity == "error" and "hundreds deep" in problem.message and str(path) in problem.message
    assert time.process_time() - start < 10


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _every_entry(key: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: [entry.update(fields) for entry in data[key]] and None


# What is done to a sound file, and words of the problem.
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an id deep in lists": (_every_entry("images", id=_deep(900)), "Expected `int | str`, got `array`"),
    "a box deep in lists": (_every_entry("annotations", bbox=_deep(900)), "Expected `array` of length 4, got 1"),
    "a name of ten million letters": (_every_entry("images", file_name="x" * 10**7), "image files are not under"),
    "a name with a NUL": (_every_entry("images", file_name="a\0/b.png"), "image files are not under"),
    "a name with half a character": (_every_entry("images", file_name="\ud800.png"), "image files are not under"),
    "a name that leaves the folder": (_every_entry("images", file_name="../../etc/passwd"), "lead out of the image"),
    "a name that leaves it by the middle": (_every_entry("images", file_name="a/../../b"), "lead out of the image"),
    "a name from the root": (_every_entry("images", file_name="/etc/passwd"), "lead out of the image"),
    "a width of 400 digits": (_every_entry("images", width=10**400), "Number out of range"),
    "an infinite height": (_every_entry("images", height=float("inf")), "Expected `float` <="),
    "a width that is no number": (_every_entry("images", width=float("nan")), "Expected `float` > 0"),
    "a box of 400 digits": (_every_entry("annotations", bbox=[10**400] * 4), "Number out of range"),
    "an infinite area": (_every_entry("annotations", area=float("inf")), "Expected `float` <="),
    "an area of 400 digits": (_every_entry("annotations", area=10**400), "Number out of range"),
    "a box that overflows": (_every_entry("annotations", bbox=[1e308] * 4), "Expected `float` <="),
    "an id that is an object": (_every_entry("annotations", image_id={"a": 1}), "`int | str`, got `object`"),
    "an id that is nothing": (_every_entry("annotations", category_id=None), "`int | str`, got `null`"),
    "an id that is no number": (_every_entry("annotations", image_id=float("nan")), "`int | str`, got `float`"),
    "every id the same": (_every_entry("annotations", id=7), "not unique: 7"),
    "categories that are texts": (lambda d: d.update(categories=["oak", "fir"]), "Expected `object`, got `str`"),
    "a name that is a list": (lambda d: d["categories"][0].update(name=["oak"]), "Expected `str`, got `array`"),
    "lists that are texts": (lambda d: d.update(images="abc"), "is a str, expected a list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_named(tmp_path: Path, case: str) -> None:
    spoil, message = HOSTILE[case]
    data = sound()
    spoil(data)
    problems = check_annotations(data, classes=CLASSES, image_root=tmp_path)
    assert any(message in problem.message for problem in problems), problems
    text = "\n".join(map(str, problems))
    assert len(text) < 10_000 and text.encode()
    with pytest.raises(ValueError, match="to solve first"):
        raise_for_problems(problems)


def test_numbers_that_json_does_not_have_are_named(tmp_path: Path) -> None:
    data = sound()
    data["annotations"][0]["bbox"] = [1, 2, "NAN", 4]
    path = tmp_path / "train.json"
    for number, message in {
        **dict.fromkeys(("NaN", "Infinity", "-Infinity", "1e999", "9" * 10_000), "is not JSON"),
        "9" * 4000: "Number out of range",
    }.items():
        path.write_text(json.dumps(data).replace('"NAN"', number))
        (problem,) = check_annotation_file(path, classes=CLASSES)
        assert message in problem.message


def test_a_truncated_file_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    whole = json.dumps(sound()).encode()
    path = tmp_path / "train.json"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        (problem,) = check_annotation_file(path)
        assert problem.severity == "error" and "is not JSON" in problem.message


def test_a_file_that_may_not_be_read_is_an_error_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(sound()))

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PermissionError, match=r"train\.json"):
        check_annotation_file(path)
