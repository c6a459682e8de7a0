"""Records survive JSON without loss, and refuse what they cannot hold."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castling_det.report.codec import from_jsonable, to_jsonable
from castling_det.report.record import (
    SCHEMA,
    Comparison,
    Counts,
    Difference,
    ImageComparison,
    Latency,
    MaskOccupancy,
    Report,
    RunRecord,
    Series,
    Speed,
    SpeedPoint,
    read_report,
    write_report_json,
)
from tests.report.records import MACHINE


def full_report() -> Report:
    """Every field set to something that is not its default."""
    series = Series((10, 20, 30), (1.5, None, 0.1))
    run = RunRecord(
        name="castling", status="ok", seed=1, attention="castling", work_dir="a", config="c.py", checkpoint="x.pth",
        checkpoint_sha256="0" * 64, metrics={"mAP": 0.25, "mAP_l": None}, metrics_source="a",
        precision={"tree": (1.0, 0.5)}, params=123, gmacs=1.25,
        gmacs_by_kind={"conv": 1.25}, input_shape=(256, 320), latency=Latency(1.5, 2, "cpu", (256, 256), 3.5, "b.json"),
        train_seconds=12.5, iterations=30, scalars={"loss": series}, validation={"mAP": series},
        mask=MaskOccupancy({"blocks.0": series}, {"blocks.0": series}, series), commands=("train",), notes=("note",),
    )  # fmt: skip
    failed = RunRecord(name="softmax", status="failed", reason="no metrics | in file\n<b>")
    images = (ImageComparison(3, "a.png", Counts(1, 2, 3), Counts(4, 0, 0)),)
    comparison = Comparison("softmax", "castling", 1, 0.3, 0.5, images)
    difference = Difference("castling", 0.01, -0.02, 0.03, 0.95, 1, 25, 1000, 7)
    point = SpeedPoint("linear", 16, 24, 384, 1.0, 1.5, 2.0, 0.5)
    speed = Speed("b.json", "tools/benchmark.py", "core", "forward", "float32", 1, MACHINE, (point,), None, "none")
    return Report(
        "softmax", "castling", "data", "tools/report.py", "2026-01-01", MACHINE, (failed, run), comparison,
        (difference,), (speed,),
    )  # fmt: skip


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = full_report()
    write_report_json(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["schema"] == SCHEMA
    assert document["report"]["runs"][0]["status"] == "failed"


def test_a_report_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    report = full_report()
    path = tmp_path / "report.json"
    write_report_json(path, report)
    document = json.loads(path.read_text())
    old = document["report"]
    for field in ("differences", "speed"):
        del old[field]
    for run in old["runs"]:
        del run["metrics_source"], run["precision"]
        if run["latency"]:
            del run["latency"]["peak_mib"], run["latency"]["source"]
    path.write_text(json.dumps({"schema": "castling_det.report/1", "report": old}))
    failed, run = report.runs
    bare = dataclasses.replace(
        run, metrics_source=None, precision={}, latency=Latency(1.5, 2, "cpu", (256, 256))
    )
    assert read_report(path) == dataclasses.replace(report, runs=(failed, bare), differences=(), speed=())
    path.write_text(json.dumps({"schema": "castling_det.report/1", "report": {"runs": 3}}))
    with pytest.raises(ValueError, match="fields of Report differ"):
        read_report(path)


finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.lists(st.integers(0, 10**9), unique=True, max_size=6).map(sorted)


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(min_size=1, max_size=8), steps=steps, seed=st.none() | st.integers(0, 99), loss=finite, data=st.data()
)
def test_any_run_survives(name: str, steps: list[int], seed: int | None, loss: float, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | finite, min_size=len(steps), max_size=len(steps)))
    series = Series(tuple(steps), tuple(values))
    run = RunRecord(name, "ok", seed=seed, metrics={"mAP": loss}, scalars={name: series}, gmacs=loss)
    assert from_jsonable(RunRecord, json.loads(json.dumps(to_jsonable(run)))) == run


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_form_for_is_refused_and_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"record\.gmacs=.*finite"):
        to_jsonable(RunRecord("a", "ok", gmacs=value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "castling_det.report/0"}, "expected 'castling_det.report/2'"),
        ({"report": {"baseline": "softmax"}}, r"missing \['comparison'"),
        ({"report": None}, "expected an object"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "report.json"
    write_report_json(path, full_report())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_report(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", 3, r"runs\[1\]\.name=3: expected str"),
        ("seed", "1", r"runs\[1\]\.seed='1': expected int"),
        ("seed", True, r"runs\[1\]\.seed=True"),
        ("input_shape", [1], r"input_shape=\[1\]: expected 2 items"),
        ("metrics", {"mAP": "high"}, r"metrics\['mAP'\]='high': expected a number"),
        ("metrics", {"accuracy": 1}, r"unknown \['accuracy'\]"),
        ("status", "fine", "status='fine'"),
        ("speed", 1, r"unknown \['speed'\]"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = tmp_path / "report.json"
    write_report_json(path, full_report())
    document = json.loads(path.read_text())
    document["report"]["runs"][1][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_report(path)


def test_records_hold_no_contradiction() -> None:
    with pytest.raises(ValueError, match="reason"):
        RunRecord("a", "failed")
    with pytest.raises(ValueError, match="reason"):
        RunRecord("a", "ok", reason="but")
    with pytest.raises(ValueError, match="steps"):
        Series((2, 1), (0.0, 0.0))
    with pytest.raises(ValueError, match=r"baseline='none'.*\['castling', 'softmax'\]"):
        dataclasses.replace(full_report(), baseline="none")


def test_f1_of_counts() -> None:
    assert Counts(0, 0, 0).f1 == 1
    assert Counts(0, 3, 0).f1 == 0
    assert Counts(3, 1, 2).f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


def test_the_mask_is_empty_from_the_last_time_that_something_was_kept() -> None:
    def empty_from(*layers: tuple[float | None, ...]) -> int | None:
        kept = {f"blocks.{i}": Series(tuple(range(10, 10 + len(v))), v) for i, v in enumerate(layers)}
        return MaskOccupancy(kept).empty_from

    assert empty_from((0.5, 0.0, 0.0), (0.4, 0.2, 0.0)) == 12
    assert empty_from((0.0, 0.5, 0.0)) == 12, "empty for a while is not empty"
    assert empty_from((0.5, 0.4, 0.1)) is None
    assert empty_from((0.5, None, None)) is None
    assert empty_from() is None
