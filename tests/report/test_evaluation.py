"""faster-coco-eval gives COCO's own figures; a draw equals the evaluation of the drawn set; malformed files."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from castling_det.report.evaluation import (
    Annotations,
    draw_images,
    evaluate_boxes,
    interval_of,
    match_boxes,
    mean_average_precisions,
)
from castling_det.report.records import METRICS, Counts
from castling_det.report.runs import RunSpec, build_run, classes_of
from tests.report.coco_sets import Rows, random_set, repeated
from tests.report.samples import dump

CONFIG = Path(__file__).parents[2] / "configs" / "castling_vit" / "gfl_castling-vit-nano_softmax_tree-crowns.py"


def reference(document: dict[str, Any], results: Rows, **params: Any) -> COCOeval:
    """pycocotools' own evaluation."""
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **document}
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes([dict(row) for row in results]), "bbox")
        vars(evaluator.params).update(params)
        evaluator.evaluate()
        if not params:
            evaluator.accumulate()
            evaluator.summarize()
    return evaluator


def perfect(document: dict[str, Any]) -> Rows:
    rows = [row for row in document["annotations"] if not row.get("iscrowd")]
    return [{**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5} for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_pycocotools(seed: int) -> None:
    document, results = random_set(seed, ties=seed % 2 == 0)
    found, expected = evaluate_boxes(document, results), reference(document, results)
    for name, value in zip(METRICS, expected.stats[:6], strict=True):
        assert found.metrics[name] == (pytest.approx(value, abs=1e-12) if value >= 0 else None), name
    assert found.precision.keys() == {"kind 0", "kind 1"}
    for index, curve in enumerate(found.precision.values()):
        assert len(curve) == 101 and curve == pytest.approx(expected.eval["precision"][0, :, index, 0, -1], abs=1e-4)
        assert curve[0] > 0


def test_the_evaluation_leaves_the_annotations_alone() -> None:
    document, results = random_set(0)
    before = repr((document, results))
    good = evaluate_boxes(document, results).metrics["mAP"]
    assert evaluate_boxes(document, perfect(document)).metrics["mAP"] == pytest.approx(1.0)
    assert good is not None and 0 < good < 0.9
    nothing = evaluate_boxes(document, [])
    assert nothing.metrics["mAP"] == 0 and nothing.precision["kind 0"][0] == 0
    assert repr((document, results)) == before


def test_an_annotation_with_the_id_0_is_found(tmp_path: Path) -> None:
    """For COCO's evaluation 0 means "not matched": a perfect box scored 0.0."""
    box = {"image_id": 5, "category_id": 1, "bbox": [1, 2, 30, 40]}
    document = {
        "images": [{"id": 5, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 0, **box, "area": 1200, "iscrowd": 0}],
    }  # fmt: skip
    assert reference(document, [{**box, "score": 0.5}]).stats[0] == 0, "the control"
    assert evaluate_boxes(document, [{**box, "score": 0.5}]).metrics["mAP"] == pytest.approx(1)
    assert mean_average_precisions(document, [{**box, "score": 0.5}]) == pytest.approx([1])
    assert match_boxes(document, [{**box, "score": 0.5}], score=0, iou=0.5)[5].counts == Counts(1, 0, 0)
    annotations = Annotations(dump(tmp_path / "val.json", document))
    results = dump(tmp_path / "results.json", [{**box, "score": 0.5}])
    run = build_run(RunSpec("a", None, predictions=results), annotations=annotations)
    assert run.ok and run.metrics["mAP"] == pytest.approx(1)


def test_boxes_of_classes_that_were_not_trained_do_not_count(tmp_path: Path) -> None:
    document, _ = random_set(0)
    trained, *others = [row["name"] for row in document["categories"]]
    path = dump(tmp_path / "ann.json", document)
    every, some = Annotations(path), Annotations(path, classes=[trained])
    found = [row for row in perfect(document) if row["category_id"] == some.document["categories"][0]["id"]]
    assert others and [row["name"] for row in some.document["categories"]] == [trained]
    assert evaluate_boxes(some.document, found).metrics["mAP"] == pytest.approx(1)
    assert evaluate_boxes(every.document, found).metrics["mAP"] < 1
    assert classes_of([RunSpec("a", None, config=CONFIG)]) == ("tree",)


def test_without_areas_and_crowds_those_of_the_boxes_count() -> None:
    document, results = random_set(1)
    plain = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in document["annotations"]]
    bare = [{key: value for key, value in row.items() if key not in ("area", "iscrowd")} for row in plain]
    none = [{**row, "area": None, "iscrowd": None} for row in bare]
    first, *others = (evaluate_boxes({**document, "annotations": rows}, results) for rows in (plain, bare, none))
    assert others == [first, first]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_draw_equals_cocos_evaluation_of_the_drawn_set(seed: int, ties: bool) -> None:
    document, results = random_set(seed, ties=ties)
    draws = draw_images(len(document["images"]), 4, seed)
    assert draws.max() > 1 and draws.min() == 0
    sets = [(document, results), *(repeated(document, results, counts.tolist()) for counts in draws)]
    expected = [reference(*drawn).stats[0] for drawn in sets]
    assert mean_average_precisions(document, results, draws) == pytest.approx(expected, abs=1e-12)
    assert max(expected) - min(expected) > 0.01, "the control: draws differ"


def test_an_image_may_have_more_than_100_detections() -> None:
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [20 * i, 0, 10, 10]} for i in range(150)]
    document = {
        "images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}], "annotations": boxes,
    }  # fmt: skip
    results = [{**box, "score": 0.5} for box in boxes]
    for number, expected in ((100, 67 / 101), (1000, 1)):  # 2/3 of COCO's 101 recalls are reached
        assert evaluate_boxes(document, results, max_detections=number).metrics["mAP"] == pytest.approx(expected)
        assert mean_average_precisions(document, results, max_detections=number) == pytest.approx([expected])


def test_a_set_with_nothing_to_find_has_no_precision() -> None:
    document, results = random_set(0)
    only_empty = 5 * np.eye(len(document["images"]), dtype=np.int64)[2]
    assert math.isnan(mean_average_precisions(document, results, [only_empty])[1])
    assert mean_average_precisions(document, []) == 0


def test_draws_are_those_of_the_seed_and_intervals_cover_what_they_should() -> None:
    draws = draw_images(9, 500, 3)
    assert draws.shape == (500, 9) and (draws.sum(axis=1) == 9).all()
    assert (draws == draw_images(9, 500, 3)).all() and (draws != draw_images(9, 500, 4)).any()
    assert draws.mean(axis=0) == pytest.approx(1, abs=0.15)
    document, results = random_set(5)
    better, worse = (mean_average_precisions(document, rows, draws)[1:] for rows in (results, results[::2]))
    assert interval_of([better - better]) == (0, 0), "paired: the same detector differs from itself by nothing"
    low, high = interval_of([better - worse])
    assert low < np.mean(better - worse) < high
    unpaired = interval_of([better - worse[::-1]])
    assert high - low < unpaired[1] - unpaired[0], "the same draws for both make the interval narrower"
    halves = interval_of([better - worse, worse - worse])
    assert halves == pytest.approx((low / 2, high / 2)), "over seeds it is that of the mean difference"


@pytest.mark.parametrize(
    ("boxes", "iou", "counts"),
    [
        ([(2, [0, 0, 10, 9], 0.5), (2, [0, 0, 10, 10], 0.4)], 0.5, Counts(1, 1, 0)),  # found once
        ([(1, [0, 0, 10, 10], 0.9)], 0.5, Counts(0, 1, 1)),  # another category
        ([(2, [0, 0, 10, 5], 0.9)], 0.5, Counts(1, 0, 0)),
        ([(2, [0, 0, 10, 4.9], 0.9)], 0.5, Counts(0, 1, 1)),
        ([(2, [0, 0, 10, 5], 0.9)], 0.6, Counts(0, 1, 1)),
        ([(2, [0, 0, 10, 10], 0.2)], 0.5, Counts(0, 0, 1)),  # below the score
        ([(3, [60, 60, 5, 5], 0.9), (3, [95, 95, 99, 99], 0.8)], 0.5, Counts(0, 1, 1)),  # inside of a crowd
        ([], 0.5, Counts(0, 0, 1)),
    ],
)
def test_right_wrong_and_missed(boxes: list[tuple[int, list[float], float]], iou: float, counts: Counts) -> None:
    rows = [(2, [0, 0, 10, 10], 0), (3, [50, 50, 50, 50], 1)]
    document = {
        "images": [{"id": 1, "file_name": "a"}], "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
        "annotations": [{"image_id": 1, "category_id": c, "bbox": box, "iscrowd": crowd} for c, box, crowd in rows],
    }  # fmt: skip
    results = [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in boxes]
    assert match_boxes(document, results, score=0.3, iou=iou)[1].counts == counts


@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_coco_on_random_boxes(seed: int) -> None:
    document, results = random_set(seed)
    expected: dict[int, list[int]] = {image["id"]: [0, 0, 0] for image in document["images"]}
    kept = [row for row in results if row["score"] >= 0.3]
    params = {"iouThrs": np.array([0.5]), "areaRng": [[0, 1e10]], "areaRngLbl": ["all"], "maxDets": [1000]}
    for item in filter(None, reference(document, kept, **params).evalImgs):
        matched, ignored = np.array(item["dtMatches"])[0] > 0, np.array(item["dtIgnore"])[0].astype(bool)
        found = np.array(item["gtMatches"])[0] > 0
        missed = ~found & ~item["gtIgnore"].astype(bool)
        for place, flags in enumerate((matched & ~ignored, ~matched & ~ignored, missed)):
            expected[item["image_id"]][place] += int(flags.sum())
    counts = match_boxes(document, results, score=0.3, iou=0.5)
    assert {image: Counts(*numbers) for image, numbers in expected.items()} == {
        image: counts[image].counts for image in expected
    }
    assert sum(numbers[0] for numbers in expected.values()) > 5, "the case is not trivial"


GOOD: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png", "height": 9, "width": 9}], "categories": [{"id": 1, "name": "a"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}],
}  # fmt: skip
ROW: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}


def _with(part: str, **fields: object) -> dict[str, Any]:
    return {**GOOD, part: [{**GOOD[part][0], **fields}]}


ANNOTATIONS = {
    "a list": [3], "null": None, "empty": {}, "no images": {**GOOD, "images": None},
    "images twice": {**GOOD, "images": GOOD["images"] * 2}, "an object of images": {**GOOD, "images": {}},
    "categories twice": {**GOOD, "categories": GOOD["categories"] * 2}, "name null": _with("images", file_name=None),
    "id huge": _with("images", id=2**80), "height string": _with("images", height="9"),
    "category name": _with("categories", name=["a"]), "box short": _with("annotations", bbox=[1, 2, 3]),
    "box huge": _with("annotations", bbox=[0, 0, 1e300, 1e300]), "crowd string": _with("annotations", iscrowd="no"),
    "image unknown": _with("annotations", image_id=7), "category unknown": _with("annotations", category_id=7),
}  # fmt: skip
RESULTS = {
    "an object": {}, "rows of lists": [[1]], "no score": [{**ROW, "score": None}], "box short": [{**ROW, "bbox": [1]}],
    "id huge": [{**ROW, "image_id": 10**30}], "image unknown": [{**ROW, "image_id": 9}],
    "a segmentation": [{key: value for key, value in ROW.items() if key != "bbox"}],
}  # fmt: skip
BYTES = {
    "nothing": b"", "cut": b'{"images": [', "not text": b"\xff\xfe\x00", "mark": b"\xef\xbb\xbf{}", "NaN": b"[NaN]",
    "deep": b"[" * 200_000, "infinite": b'[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 1e999, 1], "score": 1}]',
}  # fmt: skip


@pytest.mark.parametrize("kind", ["annotations", "results"])
@pytest.mark.parametrize("content", [*ANNOTATIONS.values(), *RESULTS.values(), *BYTES.values()],
                         ids=[*ANNOTATIONS, *RESULTS, *BYTES])  # fmt: skip
def test_a_malformed_file_gives_one_line(tmp_path: Path, kind: str, content: object) -> None:
    """Annotations raise it; a results file is a failed run with it. Neither form passes as the other."""
    path, good = tmp_path / "file.json", Annotations(dump(tmp_path / "val.json", GOOD))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    if kind == "annotations":
        with pytest.raises(ValueError, match="file") as error:
            Annotations(path)
        said = str(error.value)
    else:
        run = build_run(RunSpec("a", None, predictions=path), annotations=good)
        assert not run.ok
        said = str(run.reason)
    assert "file.json: " in said and "\n" not in said and len(said) < 500


@pytest.mark.parametrize("place", ["a folder", "nothing", "a device"])
def test_a_path_that_is_no_file_is_named(tmp_path: Path, place: str) -> None:
    path = {"a folder": tmp_path, "nothing": tmp_path / "none.json", "a device": Path("/dev/zero")}[place]
    with pytest.raises(ValueError, match="not readable as a COCO annotation file: no such regular file"):
        Annotations(path)
