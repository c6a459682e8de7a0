"""Every fault in COCO annotations gets a problem that names the field and the fix; sound data gets none."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from castling_det.datasets.checks import (
    Problem,
    check_annotation_file,
    check_annotations,
    check_classes,
    check_num_classes,
    raise_for_problems,
)

CLASSES = ("oak", "fir")


def sound(images: int = 4, boxes: int = 3) -> dict[str, Any]:
    """`images` of 100 x 80 with `boxes` each, and one more image without any."""

    def box(i: int, j: int) -> dict[str, Any]:
        place = dict(bbox=[8.0 * j, 5, 20, 30.5], area=610.0, iscrowd=0)
        return dict(id=i * boxes + j + 1, image_id=i + 1, category_id=j % 2 + 1, **place)

    return {
        "images": [dict(id=i + 1, file_name=f"{i + 1}.png", width=100, height=80) for i in range(images + 1)],
        "annotations": [box(i, j) for i in range(images) for j in range(boxes)],
        "categories": [dict(id=1, name="oak"), dict(id=2, name="fir")],
    }


def test_sound_annotations_have_no_problem():
    data = sound()
    data["images"][0]["file_name"] = "sub/../1.png"
    data["images"][1]["file_name"] = "sub/a..b.png"
    before = copy.deepcopy(data)
    assert check_annotations(data, classes=CLASSES) == []
    assert data == before


def set_box(*box):
    return lambda data: data["annotations"][4].update(bbox=list(box))


def update(key, **fields):
    return lambda data: data[key][1].update(**fields)


def without(key, field):
    return lambda data: data[key][1].pop(field)


# What is done to sound data; field and message of the problem.
FAULTS = {
    "images missing": (lambda d: d.pop("images"), "images", "is missing"),
    "no annotations": (lambda d: d.update(annotations=[]), "annotations", "is empty"),
    "annotations an object": (lambda d: d.update(annotations={}), "annotations", "is a dict, expected a list"),
    "image id twice": (update("images", id=1), "images[].id", "not unique: 1"),
    "image without id": (without("images", "id"), "images[]", "1 of 5 entries: Object missing required field `id`"),
    "annotation id twice": (update("annotations", id=1), "annotations[].id", "not unique: 1"),
    "annotation without id": (without("annotations", "id"), "annotations[]", "missing required field `id`"),
    "annotation no object": (lambda d: d["annotations"].append(7), "annotations[]", "`int`; see annotations[12]"),
    "category id twice": (update("categories", id=1), "categories[].id", "not unique: 1"),
    "category name twice": (update("categories", name="oak"), "categories[].name", "not unique: 'oak'"),
    "category without name": (without("categories", "name"), "categories[]", "1 of 2 entries: Object missing"),
    "unknown image": (update("annotations", image_id=99), "annotations[].bbox", "`image_id` that no image has: 2"),
    "unknown category": (update("annotations", category_id=9), "annotations[].bbox", "`category_id` that no category"),
    "negative width": (set_box(50, 5, -20, 30), "annotations[].bbox", "negative width or height: 5"),
    "zero height": (set_box(50, 5, 20, 0), "annotations[].bbox", "below one pixel"),
    "not a number": (set_box(50, 5, float("nan"), 30), "annotations[].bbox", "Expected `float` >= -1000000000"),
    "three numbers": (set_box(50, 5, 20), "annotations[].bbox", "`array` of length 4, got 3"),
    "outside": (set_box(100, 5, 20, 30), "annotations[].bbox", "wholly outside their image"),
    "area of zero": (update("annotations", area=0), "annotations[].bbox", "`area` of 0"),
    "no iscrowd": (without("annotations", "iscrowd"), "annotations[]", "missing required field `iscrowd`"),
    "iscrowd null": (update("annotations", iscrowd=None), "annotations[].iscrowd", "got `null`"),
    "leaves the folder": (update("images", file_name="a/../../b.png"), "images[].file_name", "'a/../../b.png'"),
    "absolute": (update("images", file_name="/b.png"), "images[].file_name", "lead out of the image folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_an_error_with_field_and_fix(fault):
    spoil, field, message = FAULTS[fault]
    data = sound()
    spoil(data)
    problems = check_annotations(data)
    found = [problem for problem in problems if problem.field == field and message in problem.message]
    assert len(found) == 1, problems
    assert found[0].severity == "error" and found[0].fix
    with pytest.raises(ValueError, match="to solve first") as caught:
        raise_for_problems(problems, source="train.json")
    assert str(caught.value).startswith("train.json: ")
    assert field in str(caught.value) and found[0].fix in str(caught.value)


def test_annotation_id_0_is_a_warning_since_evaluation_counts_it_as_missed():
    data = sound()
    data["annotations"][0]["id"] = 0
    (problem,) = check_annotations(data, classes=CLASSES)
    assert problem.severity == "warning" and "the id 0" in problem.message


def test_a_few_unusable_boxes_in_a_large_file_are_a_warning():
    data = sound(images=100)
    data["annotations"][0].update(bbox=[5, 5, 0, 10])
    data["annotations"][1].update(bbox=[500, 5, 20, 10])
    data["annotations"][2].update(bbox=[90, 5, 20, 10])
    problems = check_annotations(data)
    assert [problem.severity for problem in problems] == ["warning"] * 3
    raise_for_problems(problems)
    for annotation in data["annotations"][:4]:
        annotation.update(bbox=[5, 5, 0, 10])
    assert [problem.severity for problem in check_annotations(data)] == ["error"]


def test_corners_instead_of_sizes_are_recognised():
    data = sound()
    for annotation in data["annotations"]:
        annotation.update(bbox=[60, 50, 90, 75])
    (problem,) = check_annotations(data)
    assert problem.severity == "error" and "convert them to [x, y, width, height]" in problem.fix


def test_without_need_for_boxes_a_file_without_annotations_passes():
    data = sound()
    del data["annotations"]
    assert check_annotations(data, need_boxes=False) == []
    assert check_annotations({**data, "annotations": []}, need_boxes=False) == []
    assert check_annotations({**data, "annotations": 3}, need_boxes=False)


TEXT = json.dumps(sound())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\xff\xfe", "is not JSON in UTF-8"),
        (TEXT.encode("utf-8-sig"), "is not JSON in UTF-8 without a byte order mark"),
        (TEXT.encode("utf-16"), "is not JSON in UTF-8"),
        (TEXT.replace("oak", "ch\xeane").encode("latin-1"), "is not JSON in UTF-8"),
        (b"[]", "holds a JSON list"),
        (None, "is not a file"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "train.json"
    if content is not None:
        path.write_bytes(content)
    (problem,) = check_annotation_file(path)
    assert (problem.severity, problem.field) == ("error", "dataset.ann_file")
    assert message in problem.message and problem.fix


def test_missing_images_are_counted(tmp_path):
    data = sound()
    (tmp_path / "sub").mkdir()
    data["images"][0]["file_name"] = "sub/1.png"
    for name in ("sub/1.png", "2.png", "4.png", "5.png"):
        (tmp_path / name).touch()
    (problem,) = check_annotations(data, image_root=tmp_path)
    assert problem.field == "dataset.data_prefix['img']"
    assert f"1 of 5 image files are not under {tmp_path}" in problem.message and "'3.png'" in problem.message
    (tmp_path / "3.png").symlink_to(tmp_path / "2.png")
    assert check_annotations(data, image_root=tmp_path) == [], "a link to a file is a file"


NO_FILES = {
    "a broken link": lambda path: path.symlink_to("nothing.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("level", ["names", "pixels"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_named_like_an_image_but_is_no_file_is_missing(tmp_path, kind, level):
    NO_FILES[kind](tmp_path / "1.png")
    data = {**sound(images=1), "images": sound(images=0)["images"]}
    (problem,) = check_annotations(data, image_root=tmp_path, level=level)
    assert problem.severity == "error" and "'1.png'" in problem.message and "broken links" in problem.message


@pytest.mark.parametrize(
    ("classes", "part"),
    [
        (("person", "car"), "2 of its 2 names are no category of the annotation file: 'person', 'car'. The file has"),
        (("oak", "pine"), "1 of its 2 names"),
        (("Oak", "fir "), "case and spaces count"),
        (("fir", "oak"), "in another order"),
        (("oak", "oak", "fir"), "twice: 'oak'"),
        ("oak", "is 'oak', expected a tuple of names; a tuple of one needs a comma"),
        (3, "expected a tuple of names"),
        ((["oak"],), "expected a tuple of names"),
    ],
)
def test_classes_that_disagree_get_the_line_to_write(classes, part):
    (problem,) = check_classes(["oak", "fir"], classes)
    assert problem.severity == "error" and problem.field == "dataset.metainfo['classes']" and part in problem.message
    assert "`metainfo = dict(classes=('oak', 'fir'))`" in problem.fix
    assert "num_classes=2" in problem.fix and "train_dataloader" in problem.fix


def test_training_on_some_of_the_categories_is_a_warning():
    (problem,) = check_classes(["oak", "fir"], ["fir"])
    assert problem.severity == "warning" and "'oak'" in problem.message


def test_errors_come_first_and_warnings_alone_do_not_raise():
    warning = Problem("warning", "a", "odd.", "look.")
    raise_for_problems([warning])
    with pytest.raises(ValueError, match="1 problem to solve first"):
        raise_for_problems([warning, Problem("error", "b", "wrong.", "mend.")])


def test_a_hundred_thousand_annotations_take_seconds(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(sound(images=10_000, boxes=10)))
    start = time.process_time()
    assert check_annotation_file(path, classes=CLASSES) == []
    assert time.process_time() - start < 5.0


class Modules:
    """Stands for a torch module with named submodules."""

    def __init__(self, **counts: Any) -> None:
        self.counts = counts

    def named_modules(self) -> list[tuple[str, Any]]:
        found = [("", SimpleNamespace(num_classes=999))]
        return found + [(name.replace("__", "."), SimpleNamespace(num_classes=n)) for name, n in self.counts.items()]


def test_num_classes_that_disagrees_is_named():
    model = Modules(module__roi_head__bbox_head__0=80, module__roi_head__bbox_head__1=2, bbox_head=3)
    with pytest.raises(ValueError, match="disagree") as caught:
        check_num_classes(model, {"classes": CLASSES})
    text = str(caught.value)
    assert "model.roi_head.bbox_head[0].num_classes=80" in text and "model.bbox_head.num_classes=3" in text
    assert "bbox_head[1]" not in text and "999" not in text
    assert "write num_classes=2" in text


def test_other_counts_of_classes_are_left_alone():
    model = Modules(bbox_head=2, backbone=1000, rpn_head=1, roi_head__semantic_head=183, neck=None, x=True)
    check_num_classes(model, {"classes": CLASSES})
    check_num_classes(model, {})
