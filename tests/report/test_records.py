"""Records survive JSON without loss, and refuse what they cannot hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import subprocess
from pathlib import Path
from typing import Any

import pytest

from castling_det.report import records
from castling_det.report.records import (
    SCHEMA,
    Counts,
    Latency,
    MaskOccupancy,
    Report,
    Series,
    read_report,
    this_machine,
    write_report_json,
)
from tests.report.conftest import Demo
from tests.report.samples import dump, make_report, make_run

ROOT = Path(__file__).parents[2]


def full_report() -> Report:
    series = Series((10, 20, 30), (1.5, None, 0.1))
    mask = MaskOccupancy(30, {"blocks.0": series}, {"blocks.0": series})
    run = make_run(
        "deploy", 1, 0.25, latency=Latency(1.5, 2, "cpu", (256, 256), 3.5, "b.json"), loss=series, mask=mask,
        precision={"tree": (1.0, 0.5)}, commands=("train",), notes=("note",), params=1, input_shape=(1, 2),
    )  # fmt: skip
    return make_report(make_run("softmax", 0, None), run)


def test_a_report_survives_its_file(tmp_path: Path, demo: Demo) -> None:
    for report in (full_report(), demo.report):
        write_report_json(tmp_path / "report.json", report)
        assert read_report(tmp_path / "report.json") == report
        assert json.loads((tmp_path / "report.json").read_text())["schema"] == SCHEMA
    assert demo.report.comparison and demo.report.differences, "every kind of record"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_has_no_form_for_is_not_written(tmp_path: Path, value: float) -> None:
    report = full_report()
    bad = dataclasses.replace(report.runs[1], latency=Latency(value, 1, "cpu", (1, 1)))
    with pytest.raises(ValueError, match=r"runs\[1\]\.latency\.p50_ms"):
        write_report_json(tmp_path / "report.json", dataclasses.replace(report, runs=(report.runs[0], bad)))
    assert not list(tmp_path.iterdir())


RUN = ("report", "runs", 1)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), "castling_det.report/2", f"expected '{SCHEMA}'; make the report again"),
        (("schema",), None, "schema=None"),
        (("report",), {"baseline": "softmax"}, "missing required field `deployed`"),
        (("report",), None, "Expected `object`"),
        ((*RUN, "name"), 3, r"Expected `str`, got `int` - at `\$\.runs\[1\]\.name`"),
        ((*RUN, "seed"), True, r"runs\[1\]\.seed"),
        ((*RUN, "input_shape"), [1], "length 2"),
        ((*RUN, "metrics"), {"mAP": "high"}, r"\.metrics\[\.\.\.\]"),
        ((*RUN, "metrics"), {"accuracy": 1}, r"unknown \['accuracy'\]"),
        ((*RUN, "loss"), {"steps": [2, 1], "values": [0, 0]}, "ascending iterations"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    path = tmp_path / "report.json"
    write_report_json(path, full_report())
    document = json.loads(path.read_text())
    *above, last = place
    functools.reduce(operator.getitem, above, document)[last] = value
    with pytest.raises(ValueError, match=message):
        read_report(dump(path, document))


def test_a_baseline_that_is_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"baseline='none'.*\['deploy', 'softmax'\]"):
        dataclasses.replace(full_report(), baseline="none")


@pytest.mark.parametrize("count", [0, 1, 2, 39, 40, 41, 2000])
def test_a_long_series_is_thinned_and_keeps_its_ends(count: int) -> None:
    series = Series(tuple(range(10, 10 + count)), tuple(step + 1 / 3 for step in range(count)))
    thinned = series.thinned()
    assert len(thinned.steps) == min(count, 40) and set(thinned.steps) <= set(series.steps)
    if count:
        assert (thinned.steps[0], thinned.steps[-1]) == (series.steps[0], series.steps[-1])
        assert thinned.values[-1] == pytest.approx(series.values[-1], rel=1e-4)


def test_f1_of_counts() -> None:
    assert [Counts(0, 0, 0).f1, Counts(0, 3, 0).f1] == [1, 0]
    assert Counts(3, 1, 2).f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


def test_the_machine_line_has_the_commit_of_the_checkout() -> None:
    machine = this_machine()
    assert machine.torch in str(machine) and machine.cpu
    assert machine.commit is None or len(machine.commit.removesuffix("+changes")) == 40


def test_only_code_and_configs_count_as_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, result = tmp_path / "castling_det" / "report" / "records.py", tmp_path / "results" / "report.json"
    for path in (code, result):
        path.parent.mkdir(parents=True)
        path.write_text("as committed")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message=a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(code))
    result.write_text("measured")
    assert len(this_machine().commit or "") == 40
    code.write_text("changed")
    assert (this_machine().commit or "").endswith("+changes")


def test_records_of_the_repository_are_small_and_of_this_version() -> None:
    found = sorted((ROOT / "results").glob("*/report.json"))
    assert found and all(read_report(path).runs for path in found)
    large = {path.name: path.stat().st_size for path in (ROOT / "results").rglob("*") if path.stat().st_size > 100_000}
    assert not large
