"""The study of accuracy at equal cost: its plan, its comparisons, and its files on a page or two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from experiments import Experiment  # noqa: E402
from frontier import MATERIALS, Run, Study, write_pages  # noqa: E402

from castling_det.report.records import this_machine  # noqa: E402
from tools.benchmarks.equal_cost import multiply_adds  # noqa: E402
from tools.benchmarks.frontier_record import (  # noqa: E402
    Curve,
    Record,
    Row,
    detectors_markdown,
    duplicates,
    figure,
    gains_markdown,
    gains_of,
)

RUNS = MATERIALS["score-pages"].runs
DEPLOY = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_deploy_score-pages.py"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(Experiment(tmp_path, "castling_vit/gfl_castling-vit-nano", "score-pages"))


@pytest.mark.parametrize("data", MATERIALS)
def test_the_plan_has_every_step_once_and_each_waits_for_what_it_reads(data: str, tmp_path: Path) -> None:
    study = Study(Experiment(tmp_path, "castling_vit/gfl_castling-vit-nano", data))
    runs = study.material.runs
    steps = study.accuracies(runs)
    assert len({step.name for step in steps}) == len(steps)
    made = {step.done for step in steps}
    read = {path for step in steps for path in step.inputs if path.suffixes == [".done", ".json"]}
    assert read <= made
    trained = [step for step in steps if ": train " in step.name]
    assert len(trained) == len(runs) and all("--resume" in step.command for step in trained)


def test_three_seeds_where_the_primary_comparison_reads() -> None:
    for read in (("softmax", 448), ("softmax", 640), ("castling", 640), ("castling", 896), ("castling", 1280)):
        assert [run.seed for run in RUNS if (run.attention, run.size) == read] == [0, 1, 2]


def test_a_run_is_trained_for_its_size(study: Study) -> None:
    command = " ".join(study.train(Run("castling", 896, 0)).command)
    assert "pipeline.2.scale=(896,896)" in command
    assert "castling_score-pages.py" in command


def test_tiles_are_trained_shorter_and_exported_from_their_last_checkpoint(tmp_path: Path) -> None:
    study = Study(Experiment(tmp_path, "castling_vit/gfl_castling-vit-nano", "tree-crowns"))
    train, *others = study.accuracy(Run("castling", 384, 1))
    assert {"train_cfg.max_iters=800", "train_dataloader.dataset.pipeline.4.scale=(384,384)"} <= {*train.command}
    assert str(train.folder / "iter_800.pth") in others[0].command
    config = Config.fromfile(study.plan.config("castling"))
    assert [config.train_pipeline[place]["type"] for place in (4, 6)] == ["RandomResize", "FilterAnnotations"]


def test_larger_pages_cost_more_and_softmax_more_than_that() -> None:
    softmax = str(DEPLOY).replace("_deploy_", "_softmax_")
    small, large = (multiply_adds(str(DEPLOY), size, (931, 1280)) for size in (320, 640))
    assert 3.5 < large / small < 4.5
    # Two products of N x N x 64 in each of four blocks instead of N x 32 x 64 twice.
    tokens = 480 * 640 // 64
    extra = 4 * 2 * 64 * tokens * (tokens - 32) / 1e9
    assert multiply_adds(softmax, 640, (931, 1280)) - large == pytest.approx(extra, rel=0.01)


def test_every_fourth_page(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in (9, 3, 5, 1, 7)]
    boxes = [{"id": number, "image_id": number} for number in (1, 3, 9)]
    (tmp_path / "all.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": []}))
    write_pages(tmp_path / "all.json", tmp_path / "some.json", 4)
    found = json.loads((tmp_path / "some.json").read_text())
    assert [image["id"] for image in found["images"]] == [1, 9]
    assert [box["image_id"] for box in found["annotations"]] == [1, 9]


def test_between_two_sizes_map_is_linear_in_the_logarithm_of_the_cost() -> None:
    curve = Curve((10.0, 1000.0), np.array([[0.2, 0.1], [0.6, 0.5]]))
    np.testing.assert_allclose(curve.at(100.0), [0.4, 0.3])
    np.testing.assert_allclose(curve.at(10**1.5), [0.3, 0.2])
    np.testing.assert_allclose(curve.at(10.0), [0.2, 0.1])
    np.testing.assert_allclose(curve.at(5000.0), [0.6, 0.5])
    assert np.isnan(curve.at(9.0)).all()


def rows_and_values() -> tuple[list[Row], dict[tuple[str, int, int], np.ndarray]]:
    """Softmax at 448 and 640 costs what castling does at 896 and 1280; castling is 0.05 better at the size."""
    costs = {
        "castling": {640: 5.0, 896: 10.0, 1280: 20.0},
        "softmax": {448: 10.0, 640: 20.0},
        "softmax-window": {640: 10.0, 896: 40.0},
        "linear": {640: 5.0, 1280: 20.0},
    }
    rows, values = [], {}
    for attention, sizes in costs.items():
        for size, cost in sizes.items():
            for seed in (0, 1, 2) if attention in ("castling", "softmax") else (0,):
                value = size / 2000 + 0.05 * (attention == "castling") + 0.001 * seed
                rows.append(Row(attention, size, seed, value, value, cost, 7.0, "0" * 64, cost * 20, (), 300.0))
                values[attention, size, seed] = value + 0.002 * np.arange(-1, 2)[[1, 0, 2]]
    return rows, values


def test_gains_compare_at_equal_cost() -> None:
    rows, values = rows_and_values()
    gains = {(gain.theirs, gain.at): gain for gain in gains_of(rows, values, (448, 640))}
    for cost in ("latency", "multiply-adds"):
        at_448 = gains["softmax", f"{cost} of softmax at 448"]
        assert at_448.value == pytest.approx((896 - 448) / 2000 + 0.05) and at_448.seeds == (0, 1, 2)
        # Both move alike from draw to draw: their difference has no spread.
        assert at_448.low == pytest.approx(at_448.high)
        windows = gains["softmax-window", f"{cost} of castling at 1280"]
        assert windows.value == pytest.approx((1280 - (640 + 896) / 2) / 2000 + 0.05)
    assert gains["softmax", "image of 640 pixels"].value == pytest.approx(0.05)


def test_tables_and_figure(tmp_path: Path) -> None:
    rows, values = rows_and_values()
    gains = gains_of(rows, values, (448, 640))
    record = Record("make frontier", this_machine(), (1.0, 1.0), 2, 30, tuple(rows), gains, ())
    table = " ".join(detectors_markdown(record).split())  # columns are padded
    assert "| castling, deployed | 896 | 3 | 49.9 ± 0.1 | 49.9 | 10.00 | 200 | 300 | 7 |" in table
    row = "| softmax | latency of softmax at 448 | +27.4 | +27.4 to +27.4 | 3 |"
    assert row in " ".join(gains_markdown(record).split())
    figure(record, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_duplicates_are_boxes_within_better_ones_of_their_class() -> None:
    def box(x: float, score: float, category: int = 1, image: int = 1) -> dict[str, object]:
        return {"image_id": image, "category_id": category, "bbox": [x, 0.0, 10.0, 10.0], "score": score}

    alone = [box(0, 0.9), box(6, 0.8), box(0, 0.7, category=2), box(0, 0.6, image=2)]
    assert duplicates(alone) == 0
    assert duplicates([*alone, box(1, 0.5)]) == 1
    inside = {**box(2, 0.4), "bbox": [2.0, 2.0, 3.0, 3.0]}  # whole in the first, of which it is a tenth
    assert duplicates([*alone, inside]) == 1
