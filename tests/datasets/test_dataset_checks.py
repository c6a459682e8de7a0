"""Every fault in COCO annotations gets a problem that names the field and the fix; sound data gets none."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
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
    return {
        "images": [{"id": i + 1, "file_name": f"{i + 1}.png", "width": 100, "height": 80} for i in range(images + 1)],
        "annotations": [
            {
                "id": i * boxes + j + 1,
                "image_id": i + 1,
                "category_id": j % 2 + 1,
                "bbox": [8.0 * j, 5, 20, 30.5],
                "area": 610.0,
                "iscrowd": 0,
            }
            for i in range(images)
            for j in range(boxes)
        ],
        "categories": [{"id": 1, "name": "oak"}, {"id": 2, "name": "fir"}],
    }


def test_sound_annotations_have_no_problem() -> None:
    data = sound()
    before = copy.deepcopy(data)
    assert check_annotations(data, classes=CLASSES) == []
    assert data == before


def set_box(*box: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["annotations"][4].update(bbox=list(box))


def update(key: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[key][1].update(**fields)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "no images": (lambda d: d.update(images=[]), "images", "is empty"),
    "images missing": (lambda d: d.pop("images"), "images", "is missing"),
    "no annotations": (lambda d: d.update(annotations=[]), "annotations", "is empty"),
    "annotations an object": (
        lambda d: d.update(annotations={}),
        "annotations",
        "is a dict, expected a list",
    ),
    "no categories": (lambda d: d.update(categories=[]), "categories", "is empty"),
    "image id twice": (update("images", id=1), "images[].id", "not unique: 1"),
    "image without id": (lambda d: d["images"][1].pop("id"), "images[].id", "entries 1 have no id"),
    "annotation id twice": (update("annotations", id=1), "annotations[].id", "not unique: 1"),
    "annotation without id": (lambda d: d["annotations"][1].pop("id"), "annotations[].id", "1 annotations"),
    "annotation no object": (
        lambda d: d["annotations"].append(7),
        "annotations",
        "1 entries are no JSON objects",
    ),
    "category id twice": (update("categories", id=1), "categories[].id", "not unique: 1"),
    "category name twice": (update("categories", name="oak"), "categories[].name", "not unique: 'oak'"),
    "category without name": (
        lambda d: d["categories"][1].pop("name"),
        "categories[]",
        "1 of 2 entries lack",
    ),
    "unknown image": (
        update("annotations", image_id=99),
        "annotations[].bbox",
        "`image_id` that no image has; ids 2",
    ),
    "image id a list": (
        update("annotations", image_id=[1]),
        "annotations[].bbox",
        "`image_id` that no image",
    ),
    "unknown category": (
        update("annotations", category_id=9),
        "annotations[].bbox",
        "`category_id` that no category",
    ),
    "negative width": (set_box(50, 5, -20, 30), "annotations[].bbox", "negative width or height; ids 5"),
    "zero height": (set_box(50, 5, 20, 0), "annotations[].bbox", "below one pixel"),
    "not a number": (set_box(50, 5, float("nan"), 30), "annotations[].bbox", "four finite numbers"),
    "infinite": (set_box(50, 5, float("inf"), 30), "annotations[].bbox", "four finite numbers"),
    "three numbers": (set_box(50, 5, 20), "annotations[].bbox", "four finite numbers"),
    "text in a box": (set_box(50, 5, 20, "30"), "annotations[].bbox", "four finite numbers"),
    "outside": (set_box(100, 5, 20, 30), "annotations[].bbox", "wholly outside their image"),
    "no area": (lambda d: d["annotations"][1].pop("area"), "annotations[].bbox", "lack a number in `area`"),
    "area of zero": (update("annotations", area=0), "annotations[].bbox", "`area` of 0"),
    "no size": (
        lambda d: d["images"][1].pop("width"),
        "images[].width/height",
        "no positive numbers in images 2",
    ),
    "no file name": (
        lambda d: d["images"][1].pop("file_name"),
        "images[].file_name",
        "is no text in images 2",
    ),
    "leaves the folder": (
        update("images", file_name="a/../../b.png"),
        "images[].file_name",
        "'a/../../b.png'",
    ),
    "absolute": (update("images", file_name="/b.png"), "images[].file_name", "leads out of the image folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_an_error_with_field_and_fix(fault: str) -> None:
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


def test_names_inside_the_folder_pass() -> None:
    data = sound()
    data["images"][0]["file_name"] = "sub/../1.png"
    data["images"][1]["file_name"] = "sub/a..b.png"
    assert check_annotations(data) == []


def test_a_few_unusable_boxes_in_a_large_file_are_a_warning() -> None:
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


def test_corners_instead_of_sizes_are_recognised() -> None:
    data = sound()
    for annotation in data["annotations"]:
        annotation.update(bbox=[60, 50, 90, 75])
    (problem,) = check_annotations(data)
    assert problem.severity == "error" and "[x, y, width, height]" in problem.fix


def test_without_need_for_boxes_a_file_without_annotations_passes() -> None:
    data = sound()
    del data["annotations"]
    assert check_annotations(data, need_boxes=False) == []
    assert check_annotations({**data, "annotations": []}, need_boxes=False) == []
    assert check_annotations({**data, "annotations": 3}, need_boxes=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b'{"images": [', "is not JSON"),
        (b"\x89PNG\xff\xfe", "is not JSON"),
        (b"[]", "holds a JSON list"),
        (None, "is not a file"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_bytes(content)
    (problem,) = check_annotation_file(path)
    assert (problem.severity, problem.field) == ("error", "dataset.ann_file")
    assert message in problem.message and problem.fix


def test_missing_images_are_counted(tmp_path: Path) -> None:
    data = sound()
    (tmp_path / "sub").mkdir()
    data["images"][0]["file_name"] = "sub/1.png"
    for name in ("sub/1.png", "2.png", "4.png", "5.png"):
        (tmp_path / name).touch()
    (problem,) = check_annotations(data, image_root=tmp_path)
    assert problem.field == "dataset.data_prefix['img']"
    assert f"1 of 5 image files are not under {tmp_path}: '3.png'" in problem.message
    (tmp_path / "3.png").touch()
    assert check_annotations(data, image_root=tmp_path) == []


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        (("person", "car"), ["2 of its 2 names", "'person', 'car'", "metainfo lacks 'oak', 'fir'"]),
        (("oak", "pine"), ["1 of its 2 names", "'pine'", "metainfo lacks 'fir'"]),
        (("Oak", "fir "), ["'Oak' and 'oak' differ in case or space only", "'fir ' and 'fir'"]),
        (("oak", "fir", "pine"), ["1 of its 3 names"]),
        (("fir", "oak"), ["in another order"]),
        (("oak", "oak", "fir"), ["twice: 'oak'"]),
        ("oak", ["is the text 'oak'"]),
        (3, ["expected a tuple of names"]),
    ],
)
def test_classes_that_disagree_get_the_line_to_write(classes: object, parts: list[str]) -> None:
    (problem,) = check_classes(["oak", "fir"], classes)
    assert problem.severity == "error" and problem.field == "dataset.metainfo['classes']"
    for part in parts:
        assert part in problem.message
    assert "`metainfo = dict(classes=('oak', 'fir'))`" in problem.fix
    assert "num_classes=2" in problem.fix and "train_dataloader" in problem.fix


def test_a_single_class_is_written_as_a_tuple() -> None:
    (problem,) = check_classes(["tree"], ("person",))
    assert "dict(classes=('tree',))" in problem.fix


def test_training_on_some_of_the_categories_is_a_warning() -> None:
    (problem,) = check_classes(["oak", "fir"], ["fir"])
    assert problem.severity == "warning" and "'oak'" in problem.message


def test_errors_come_first_and_warnings_alone_do_not_raise() -> None:
    warning = Problem("warning", "a", "odd.", "look.")
    raise_for_problems([warning])
    with pytest.raises(ValueError, match="1 problem to solve first"):
        raise_for_problems([warning, Problem("error", "b", "wrong.", "mend.")])


def test_a_hundred_thousand_annotations_take_seconds(tmp_path: Path) -> None:
    data = sound(images=10_000, boxes=10)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(data))
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


def test_num_classes_that_disagrees_is_named() -> None:
    model = Modules(module__roi_head__bbox_head__0=80, module__roi_head__bbox_head__1=2, bbox_head=3)
    with pytest.raises(ValueError, match="disagree") as caught:
        check_num_classes(model, {"classes": CLASSES})
    text = str(caught.value)
    assert "model.roi_head.bbox_head[0].num_classes=80" in text and "model.bbox_head.num_classes=3" in text
    assert "bbox_head[1]" not in text and "999" not in text
    assert "write num_classes=2" in text


def test_other_counts_of_classes_are_left_alone() -> None:
    model = Modules(bbox_head=2, backbone=1000, rpn_head=1, roi_head__semantic_head=183, neck=None, x=True)
    check_num_classes(model, {"classes": CLASSES})
    check_num_classes(model, {})
    with pytest.raises(ValueError, match=r"classes=\('tree',\)"):
        check_num_classes(model, {"classes": "tree"})
