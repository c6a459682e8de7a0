"""Both backends of COCO evaluation give the same figures; a draw gives what evaluating the drawn set gives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from castling_det.report.bootstrap import Matches, draw_images, interval_of, mean_average_precisions
from castling_det.report.evaluation import BACKENDS, evaluate_boxes
from castling_det.report.record import METRICS
from tests.report.coco_sets import random_set, repeated


@pytest.mark.parametrize("seed", range(4))
def test_faster_coco_eval_equals_pycocotools(seed: int) -> None:
    pytest.importorskip("faster_coco_eval", reason="the optional faster-coco-eval is not installed")
    document, results = random_set(seed, ties=seed % 2 == 0)
    faster, slower = (evaluate_boxes(document, results, backend=backend) for backend in BACKENDS)
    assert faster.backend.startswith("faster-coco-eval ") and slower.backend.startswith("pycocotools ")
    for name in METRICS:
        assert faster.metrics[name] == pytest.approx(slower.metrics[name], abs=1e-12), name
    assert faster.precision.keys() == slower.precision.keys() == {"kind 0", "kind 1"}
    for name, curve in faster.precision.items():
        assert len(curve) == 101 and curve == pytest.approx(slower.precision[name], abs=1e-9)
        assert curve[0] > 0
    assert evaluate_boxes(document, results) == faster, "it is taken where it is installed"


def test_the_evaluation_is_of_the_boxes_and_leaves_the_annotations_alone() -> None:
    document, results = random_set(0)
    before = repr(document)
    good = evaluate_boxes(document, results).metrics["mAP"]
    boxes = [row for row in document["annotations"] if not row["iscrowd"]]
    perfect = [{**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5} for row in boxes]
    assert evaluate_boxes(document, perfect).metrics["mAP"] == pytest.approx(1.0)
    assert good is not None and 0 < good < 0.9
    nothing = evaluate_boxes(document, [])
    assert nothing.metrics["mAP"] == 0 and nothing.precision["kind 0"][0] == 0
    assert repr(document) == before
    with pytest.raises(ValueError, match="backend='other': expected one of faster-coco-eval, pycocotools"):
        evaluate_boxes(document, results, backend="other")


def test_without_areas_and_crowds_those_of_the_boxes_count() -> None:
    document, results = random_set(1)
    plain = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in document["annotations"]]
    bare = [{key: value for key, value in row.items() if key not in ("area", "iscrowd")} for row in plain]
    left, right = (evaluate_boxes({**document, "annotations": rows}, results) for rows in (plain, bare))
    assert left == right


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_draw_equals_cocos_evaluation_of_the_drawn_set(seed: int, ties: bool) -> None:
    document, results = random_set(seed, ties=ties)
    matches = Matches(document, results)
    assert matches.images == tuple(sorted(image["id"] for image in document["images"]))
    whole = evaluate_boxes(document, results, backend="pycocotools").metrics["mAP"]
    assert matches.mean_average_precision() == pytest.approx(whole, abs=1e-12)
    figures = []
    for counts in draw_images(len(matches.images), 4, seed):
        assert counts.max() > 1 and counts.min() == 0
        drawn = repeated(document, results, counts.tolist())
        expected = evaluate_boxes(*drawn, backend="pycocotools").metrics["mAP"]
        assert matches.mean_average_precision(counts) == pytest.approx(expected, abs=1e-12)
        figures.append(expected)
    assert whole is not None and max(abs(figure - whole) for figure in figures) > 0.01, "the control: draws differ"


def test_a_set_with_nothing_to_find_has_no_precision() -> None:
    document, results = random_set(0)
    matches = Matches(document, results)
    only_empty = np.zeros(len(matches.images), dtype=np.int64)
    only_empty[2] = 5
    assert math.isnan(matches.mean_average_precision(only_empty))
    assert Matches(document, []).mean_average_precision() == 0


def test_draws_are_those_of_the_seed_and_intervals_cover_what_they_should() -> None:
    draws = draw_images(9, 500, 3)
    assert draws.shape == (500, 9) and (draws.sum(axis=1) == 9).all()
    assert (draws == draw_images(9, 500, 3)).all() and (draws != draw_images(9, 500, 4)).any()
    assert draws.mean(axis=0) == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="resamples=0"):
        draw_images(9, 0, 0)
    document, results = random_set(5)
    better = mean_average_precisions(Matches(document, results), draws)
    worse = mean_average_precisions(Matches(document, results[::2]), draws)
    assert interval_of([better - better]) == (0, 0), "paired: the same detector differs from itself by nothing"
    low, high = interval_of([better - worse])
    assert low < np.mean(better - worse) < high
    unpaired = interval_of([better - worse[::-1]])
    assert high - low < unpaired[1] - unpaired[0], "the same draws for both make the interval narrower"
    halves = interval_of([better - worse, worse - worse])
    assert halves == pytest.approx((low / 2, high / 2)), "over seeds it is that of the mean difference"
