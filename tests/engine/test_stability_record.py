"""What tools/stability.py makes of a log: skipped steps are those after which the loss scale fell, NaN is counted."""

from __future__ import annotations

import json

import pytest

from tests.report.samples import write_session
from tools.stability import record, skipped_steps


@pytest.mark.parametrize(
    "scales, expected",
    [
        ((), 0),
        ((65536.0,), 0),
        ((65536.0, 65536.0, 131072.0), 0),
        ((65536.0, 32768.0, 16384.0, 32768.0, 16384.0), 3),
        ((65536.0, None, 32768.0), 1),
    ],
)
def test_a_step_was_skipped_where_the_scale_falls(scales, expected):
    assert skipped_steps(scales) == expected


def log_with(tmp_path, change, *, total=20, validation=None):
    """A session in which `change(row)` edits every row of an iteration, and validations also say `validation`."""
    write_session(tmp_path, "20260101_100000", range(1, total + 1), total=total, mask=True)
    (path,) = tmp_path.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            row["loss_scale"] = 65536.0
            change(row)
        elif "coco/bbox_mAP" in row:
            row.update(validation or {})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return record(tmp_path, precision="fp16", batch_size=1, command="here")


def test_a_finite_training_has_nothing_to_count(tmp_path):
    """COCO's -1, where no box has a size, is no fault either."""
    found = log_with(tmp_path, lambda row: None, total=50, validation={"coco/bbox_mAP_l": -1.0})
    assert found["validation"]["mAP_l"] is None
    assert (found["not_finite"], found["skipped_steps"], found["max_grad_norm"]) == (0, 0, 1.5)
    assert {"loss", "grad_norm", "lr", "loss_scale"} < set(found["traces"])


def test_an_overflow_that_was_skipped_is_no_fault(tmp_path):
    def overflow(row):
        if row["step"] == 7:
            row["grad_norm"] = float("inf")
        if row["step"] > 7:
            row["loss_scale"] = 32768.0

    found = log_with(tmp_path, overflow)
    assert (found["not_finite"], found["skipped_steps"], found["max_grad_norm"]) == (0, 1, 1.5)


@pytest.mark.parametrize("name", ["grad_norm", "loss"])
def test_a_value_that_is_not_finite_without_a_skip_is_a_fault(tmp_path, name):
    def fault(row):
        if row["step"] in (7, 9):
            row[name] = float("nan")

    assert log_with(tmp_path, fault)["not_finite"] == 2
