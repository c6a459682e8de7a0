"""From records to tables: spreads, differences, losses, latencies, failed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from castling_det.report.build import build_report
from castling_det.report.evaluation import Annotations
from castling_det.report.records import RunRecord, Series, read_report, summaries
from castling_det.report.render import headline, html_page, markdown, write_report
from castling_det.report.runs import RunSpec, final_loss
from tests.report.conftest import Demo
from tests.report.samples import dump, make_report, make_run, write_data
from tools.dev.tables import loss_table
from tools.report import read_latency


def cells(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of their row; of several tables, the first."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in reversed(rows)}


def test_the_markdown_holds_the_table(demo: Demo) -> None:
    text = markdown(demo.report)
    table = cells(text)
    softmax, deploy = table["softmax"], table["deploy"]
    assert table["run"] == [
        "seeds", "mAP", "mAP - softmax", "95% interval", "mAP50", "mAP75", "mAP_s", "params (M)", "GMACs at 128x128",
        "latency p50 (ms)", "peak memory (MiB)", "training (h:m:s)",
    ]  # fmt: skip
    mean = sum(run.metrics["mAP"] or 0 for run in demo.report.runs_named("softmax")) / 2
    assert softmax[0] == "2" and softmax[1].startswith(f"{mean:.3f} ± ") and softmax[2:4] == ["baseline", "-"]
    found = demo.report.difference_of("deploy")
    assert found is not None and deploy[3] == f"{found.low:+.3f} to {found.high:+.3f}"
    assert "6 test images: 200 draws with replacement (seed 0)" in text.replace("\n", " ")
    assert (softmax[9], deploy[9]) == ("0.4", "0.1") and softmax[10] == "128.0" and softmax[11] == "0:01:40"
    assert "tools/report.py --x" in text and "train.py softmax.py" in text
    assert all(len(line) <= 130 for line in text.splitlines() if not line.startswith(("|", "- ")))
    assert "mAP_s" not in headline(demo.report) and "95% interval" in headline(demo.report), "the README's is narrow"


def test_differences_are_paired_by_seed() -> None:
    scores = (("softmax", 0, 0.2), ("softmax", 1, 0.4), ("deploy", 1, 0.45), ("deploy", 0, 0.23))
    difference = summaries(make_report(*(make_run(*score) for score in scores)))[1].differences["mAP"]
    assert difference is not None and difference.mean == pytest.approx(0.04)
    assert difference.std == pytest.approx(0.01414, rel=1e-3)
    without_seeds = make_report(*(make_run(name, None, mAP) for name, _, mAP in scores))
    difference = summaries(without_seeds)[1].differences["mAP"]
    assert difference is not None and difference.mean == pytest.approx(0.04) and difference.std is None


def test_a_mean_that_would_leave_a_seed_out_is_not_given() -> None:
    lacking = make_run("deploy", 1, 0.4, metrics={"mAP": 0.4, "mAP50": None})
    report = make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.3), lacking)
    spreads = summaries(report)[1].spreads
    assert spreads["mAP"] and spreads["mAP50"] is None and cells(headline(report))["deploy"][3] == "-"


def test_a_failed_run_says_so_everywhere(tmp_path: Path) -> None:
    scores = (("softmax", 0, 0.2), ("deploy", 0, 0.3), ("deploy", 1, None), ("linear", 0, None))
    report = make_report(*(make_run(*score) for score in scores))
    write_report(tmp_path, report)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "index.html").read_text()
    assert cells(text)["deploy"][:3] == ["1 (FAILED: 1)", "0.300", "+0.100"], "one seed has no spread"
    assert cells(text)["linear"][:2] == ["0 (FAILED: 1)", "-"]
    assert "- deploy (seed 1): FAILED: it \\| broke badly &lt;here>" in text
    assert text.count("FAILED |") == 2, "each has its row"
    assert page.count("FAILED: it | broke\nbadly &lt;here&gt;") == 4
    assert read_report(tmp_path / "report.json") == report
    good = make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.3))
    assert "FAILED" not in markdown(good) + html_page(good), "the control: nothing failed, nothing says so"


def test_the_final_loss_is_the_mean_of_the_last_quarter_or_none_where_it_is_not_finite() -> None:
    assert final_loss(Series((10, 80, 90, 100), (5.0, 1.0, 2.0, 6.0))) == 3.0
    for series in (Series(), Series((50, 100), (1.0, None)), Series((80, 100), (1.0, None))):
        assert final_loss(series) is None


def test_losses_are_compared_with_the_same_seed_and_without_failed_runs() -> None:
    """Seeds far apart, differences alike: unpaired they would have a spread of 1."""
    losses = (("softmax", 0, 1.0), ("softmax", 1, 2.0), ("deploy", 1, 2.1), ("deploy", 0, 1.3))
    runs = [make_run(name, seed, 0.1, final_loss=loss) for name, seed, loss in losses]
    table = cells(loss_table(make_report(*runs, make_run("deploy", 2, None, final_loss=9.0), make_run("x", 0, 0.1))))
    assert table["run"] == ["seeds", "loss", "loss - softmax"]
    assert table["softmax"] == ["2", "1.500 ± 0.707", "baseline"]
    assert table["deploy"] == ["2", "1.700 ± 0.566", "+0.200 ± 0.141"] and table["x"] == ["1", "-", "-"]


def test_latency_is_read_not_measured(tmp_path: Path) -> None:
    row = {"p50_ms": 12, "threads": 2, "device": "cpu", "input_shape": [64, 64]}
    latency = read_latency(dump(tmp_path / "l.json", {"latency": {"deploy": row}}))["deploy"]
    assert latency.source == str(tmp_path / "l.json") and latency.peak_mib is None
    assert latency.p50_ms == 12.0 and latency.input_shape == (64, 64)
    text = markdown(make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.3, latency=latency)))
    assert "64x64 pixels, 2 threads, cpu" in text and cells(text)["deploy"][-1] == "12.0"
    for broken in ({"latency": {"deploy": {"p50_ms": 12}}}, [], {"latency": 3}, {}):
        with pytest.raises(ValueError, match=r"l\.json: .*\"latency\": \{NAME"):
            read_latency(dump(tmp_path / "l.json", broken))


def test_a_latency_of_no_run_is_refused(tmp_path: Path) -> None:
    annotations = Annotations(write_data(tmp_path)[0])
    with pytest.raises(ValueError, match=r"latency: \['c'\] are no runs; expected some of \['a', 'b'\]"):
        build_report([RunSpec("a", tmp_path), RunSpec("b", tmp_path)], baseline="a", deployed="b",
                     annotations=annotations, created_by="x", latency={"c": None})  # type: ignore[dict-item]  # fmt: skip


def test_a_report_of_nothing_but_names_is_rendered() -> None:
    report = make_report(RunRecord("softmax"), RunRecord("deploy"))
    assert cells(markdown(report))["deploy"] == ["1", "-", "-", "-", "-", "-", "-"]
    assert "No pictures" in html_page(report)
