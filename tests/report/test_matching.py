"""Right, wrong and missed boxes against a hand-made case and against COCO's own evaluation."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from castling_det.report.matching import Boxes, match
from castling_det.report.record import Counts


def _boxes(rows: list[tuple[float, ...]], *, labels: list[int] | None = None, crowd: list[bool] | None = None) -> Boxes:
    """Rows of x0, y0, x1, y1 and, for detections, a score."""
    array = np.array(rows, dtype=float) if rows else np.zeros((0, 5))
    return Boxes(
        xyxy=array[:, :4],
        labels=np.array(labels if labels is not None else [1] * len(rows), dtype=np.int64),
        scores=array[:, 4] if array.shape[1] > 4 else np.ones(len(rows)),
        crowd=np.array(crowd if crowd is not None else [False] * len(rows), dtype=bool),
    )


def test_one_annotation_is_found_once_and_by_the_better_box() -> None:
    truth = _boxes([(0, 0, 10, 10)])
    found = match(_boxes([(0, 0, 10, 9, 0.5), (0, 0, 10, 10, 0.4)]), truth)
    assert found.right.tolist() == [True, False]
    assert found.counts == Counts(1, 1, 0)


def test_the_category_and_the_iou_decide() -> None:
    truth = _boxes([(0, 0, 10, 10)], labels=[2])
    assert match(_boxes([(0, 0, 10, 10, 0.9)], labels=[1]), truth).counts == Counts(0, 1, 1)
    assert match(_boxes([(0, 0, 10, 5, 0.9)], labels=[2]), truth).counts == Counts(1, 0, 0)
    assert match(_boxes([(0, 0, 10, 4.9, 0.9)], labels=[2]), truth).counts == Counts(0, 1, 1)
    assert match(_boxes([(0, 0, 10, 5, 0.9)], labels=[2]), truth, iou=0.6).counts == Counts(0, 1, 1)


def test_a_crowd_is_neither_found_nor_missed() -> None:
    truth = _boxes([(0, 0, 100, 100)], crowd=[True])
    found = match(_boxes([(10, 10, 20, 20, 0.9), (95, 95, 200, 200, 0.8)]), truth)
    assert found.ignored.tolist() == [True, False]
    assert found.counts == Counts(0, 1, 0)


def test_nothing_at_all() -> None:
    assert match(_boxes([]), _boxes([])).counts == Counts(0, 0, 0)
    assert match(_boxes([]), _boxes([(0, 0, 1, 1)])).counts == Counts(0, 0, 1)
    assert match(_boxes([(0, 0, 1, 1, 0.5)]), _boxes([])).counts == Counts(0, 1, 0)


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_coco_on_random_boxes(seed: int) -> None:
    random = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        low = random.uniform(0, 60, (count, 2))
        return np.concatenate([low, low + random.uniform(8, 40, (count, 2))], axis=1)

    gt, labels = boxes(25), random.integers(1, 3, 25)
    crowd = random.uniform(size=25) < 0.15
    dt = np.concatenate([gt + np.tile(random.normal(0, 3, (25, 2)), 2), boxes(15)])
    dt_labels = np.concatenate([labels, random.integers(1, 3, 15)])
    scores = random.uniform(0.05, 1, len(dt))

    def xywh(box: np.ndarray) -> list[float]:
        return [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": 1, "width": 100, "height": 100}],
            "categories": [{"id": 1}, {"id": 2}],
            "annotations": [
                {"id": i + 1, "image_id": 1, "category_id": int(labels[i]), "bbox": xywh(gt[i]),
                 "iscrowd": int(crowd[i]), "area": float(np.prod(gt[i, 2:] - gt[i, :2]))}
                for i in range(25)
            ],
        }  # fmt: skip
        coco.createIndex()
        results = [
            {"image_id": 1, "category_id": int(dt_labels[i]), "bbox": xywh(dt[i]), "score": float(scores[i])}
            for i in range(len(dt))
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
    expected = [0, 0, 0]
    for item in evaluation.evalImgs[: len(evaluation.params.catIds) * 4 : 4]:
        matched, ignored = np.array(item["dtMatches"])[0] > 0, np.array(item["dtIgnore"])[0].astype(bool)
        expected[0] += int((matched & ~ignored).sum())
        expected[1] += int((~matched & ~ignored).sum())
        found = (np.array(item["gtMatches"])[0] > 0) & ~item["gtIgnore"].astype(bool)
        expected[2] += int((~item["gtIgnore"].astype(bool)).sum() - found.sum())
    detections = _boxes([(*box, score) for box, score in zip(dt, scores, strict=True)], labels=dt_labels.tolist())
    result = match(detections, _boxes(list(map(tuple, gt)), labels=labels.tolist(), crowd=crowd.tolist()))
    assert result.counts == Counts(*expected)
    assert result.counts.tp > 5, "the case is not trivial"
