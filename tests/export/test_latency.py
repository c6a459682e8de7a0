"""The latency table: every combination has a row, a failed one says why, ratios are of the medians."""

from __future__ import annotations

import pytest

from castling_det.analysis.benchmark import Timing
from castling_det.export import latency
from castling_det.export.latency import FIELD, SCHEMA, LatencyReport, LatencyRow, measure_latency
from castling_det.report.records import read_document, this_machine
from tests.export.conftest import tiny_config
from tools import deployed_latency as tool


def timing(milliseconds):
    return Timing(p20_ms=milliseconds, p50_ms=milliseconds, p80_ms=milliseconds, repeats=3)


def test_eager_rows_of_both_attentions_at_each_size(tmp_path):
    report = measure_latency(tiny_config("gfl_vit"), sizes=[64, 96], runtimes=["eager"], max_seconds=0.01)
    assert [(row.attention, row.runtime, row.size) for row in report.rows] == [
        ("linear", "eager", 64),
        ("softmax", "eager", 64),
        ("linear", "eager", 96),
        ("softmax", "eager", 96),
    ]
    assert all(row.timing.p50_ms > 0 for row in report.rows) and not report.failed
    report.write(tmp_path)
    fix = "measure again"
    assert read_document(tmp_path / "latency.json", LatencyReport, schema=SCHEMA, field=FIELD, fix=fix) == report


def test_a_runtime_that_fails_is_a_row_that_says_so(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no compiler here\nand a trace")

    monkeypatch.setitem(latency._MAKERS, "aoti", fails)
    report = measure_latency(tiny_config("gfl_vit"), sizes=[64], runtimes=["aoti"], attentions=["linear"])
    assert report.failed and report.rows[0].reason == "no compiler here"
    assert "- linear, aoti, 64: failed: no compiler here" in report.markdown()


def test_the_ratio_is_softmax_over_linear():
    rows = (LatencyRow("linear", "eager", 64, timing(10.0)), LatencyRow("softmax", "eager", 64, timing(25.0)))
    text = LatencyReport("x.py", "command", this_machine(), rows).markdown()
    assert [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]] == ["eager", "25.0", "10.0", "2.50"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sizes=[50]), r"sizes=\(50,\): expected multiples of pad_size_divisor=32"),
        (dict(sizes=[64], runtimes=["tensorrt"]), r"runtimes=\('tensorrt',\): expected some of eager"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(tiny_config("gfl_vit"), **options)


def test_the_tool_refuses_in_one_line(tmp_path, capsys):
    assert tool.main([str(tmp_path / "none.py")]) == 1
    assert capsys.readouterr().err.startswith("deployed_latency: ")
