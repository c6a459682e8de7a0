"""From work dirs to records, table and Markdown: spreads, differences, failed runs, bad input."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from castling_det.report import (
    Annotations,
    RunSpec,
    build_run,
    comparison_pictures,
    headline,
    html_page,
    markdown,
    read_latency,
    write_report,
)
from castling_det.report.csv_file import csv_text
from castling_det.report.record import Counts, read_report
from castling_det.report.table import duration, headline_cells, summaries
from tests.report.conftest import Demo
from tests.report.records import make_report, make_run
from tests.report.samples import write_data, write_demo, write_predictions, write_test


def test_the_records_hold_what_the_work_dirs_say(demo: Demo) -> None:
    report = demo.report
    assert [(run.name, run.seed) for run in report.runs] == [
        (name, seed) for seed in (0, 1) for name in ("softmax", "castling", "deploy")
    ]
    softmax, castling, deploy = report.runs[:3]
    assert not report.failed and not any(run.notes for run in report.runs)
    recorded = json.loads(next(Path(str(softmax.work_dir)).glob("test/*/2*.json")).read_text())
    assert softmax.metrics_source == "tools/test.py"
    assert softmax.metrics["mAP"] == recorded["coco/bbox_mAP"] > 0
    assert softmax.metrics["mAP75"] == recorded["coco/bbox_mAP_75"] != softmax.metrics["mAP"]
    assert softmax.metrics["mAP_l"] is None and recorded["coco/bbox_mAP_l"] == -1
    assert len(softmax.precision["tree"]) == 101
    assert (softmax.attention, castling.attention, deploy.attention) == ("softmax", "castling", "linear")
    assert softmax.input_shape == (128, 128), "64 pixels, brought to 128 by the test pipeline"
    assert softmax.params == deploy.params and softmax.gmacs is not None and deploy.gmacs is not None
    assert deploy.gmacs == castling.gmacs < softmax.gmacs
    assert castling.mask.empty_from == 160 and not softmax.mask.kept_fraction
    assert deploy.scalars == castling.scalars, "from the training that the manifest names"
    assert deploy.checkpoint_sha256 != castling.checkpoint_sha256 is not None
    assert castling.iterations == 200 and castling.train_seconds == pytest.approx(100)
    assert castling.commands == ("python train.py castling.py --cfg-options randomness.seed=0",)


def test_the_comparison_puts_the_largest_difference_first(demo: Demo) -> None:
    comparison = demo.report.comparison
    assert comparison is not None and comparison.seed == 0 and len(comparison.images) == 6
    differences = [abs(image.f1_difference) for image in comparison.images]
    assert differences == sorted(differences, reverse=True)
    # On odd images the softmax predictions lack two of three boxes; on image 0 both have one wrong box above the score.
    assert comparison.images[0].image_id % 2 == 1
    assert comparison.images[0].baseline == Counts(1, 0, 2) and comparison.images[0].deployed == Counts(3, 0, 0)
    first = next(image for image in comparison.images if image.image_id == 0)
    assert first.baseline == first.deployed == Counts(3, 1, 0)


def test_the_markdown_holds_the_table(demo: Demo) -> None:
    text = markdown(demo.report)
    lines = text.splitlines()
    head, softmax, deploy = (
        [cell.strip() for cell in next(line for line in lines if line.startswith(start)).split("|")[1:-1]]
        for start in ("| run", "| softmax", "| deploy")
    )
    assert head == [
        "run", "seeds", "mAP", "mAP - softmax", "95% interval", "mAP50", "mAP75", "mAP_s", "params (M)",
        "GMACs at 128x128", "latency p50 (ms)", "peak memory (MiB)", "training",
    ]  # fmt: skip
    mean = sum(run.metrics["mAP"] or 0 for run in demo.report.runs_named("softmax")) / 2
    assert softmax[1] == "2" and softmax[2].startswith(f"{mean:.3f} ± ") and softmax[3:5] == ["baseline", "-"]
    found = demo.report.difference_of("deploy")
    assert found is not None and deploy[4] == f"{found.low:+.3f} to {found.high:+.3f}"
    assert "6 test images: 200 draws with replacement (seed 0)" in text.replace("\n", " ")
    assert (softmax[10], deploy[10]) == ("0.4", "0.1") and softmax[11] == "128.0" and softmax[12] == "1 min 40 s"
    assert "tools/report.py --x" in text and "train.py softmax.py" in text
    assert all(len(line) <= 130 for line in lines if not line.startswith(("|", "- ")))
    assert "mAP_s" not in headline(demo.report) and "95% interval" in headline(demo.report), "the README's is narrow"


def test_the_table_for_a_spreadsheet_has_a_row_a_run_with_units(demo: Demo) -> None:
    failed = make_run("softmax", 5, None)
    report = dataclasses.replace(demo.report, runs=(*demo.report.runs, failed))
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert [row["run"] for row in rows] == [run.name for run in report.runs]
    deploy = rows[2]
    run, found = report.runs[2], report.difference_of("deploy")
    assert found is not None and float(deploy["mAP_minus_baseline_low"]) == found.low
    assert float(deploy["gmacs"]) == run.gmacs and deploy["gmacs_input_width_px"] == "128"
    assert float(deploy["latency_p50_ms"]) == pytest.approx(0.128) and deploy["peak_memory_mib"] == "128.0"
    assert deploy["mask_empty_from_iteration"] == "160" and float(deploy["training_seconds"]) == pytest.approx(100)
    assert rows[-1]["status"] == "failed" and rows[-1]["reason"] == "it | broke\nbadly <here>" and not rows[-1]["mAP"]


def test_differences_are_paired_by_seed() -> None:
    scores = (("softmax", 0, 0.2), ("softmax", 1, 0.4), ("deploy", 1, 0.45), ("deploy", 0, 0.23))
    difference = summaries(make_report(*(make_run(*score) for score in scores)))[1].difference
    assert difference is not None and difference.mean == pytest.approx(0.04)
    assert difference.std == pytest.approx(0.01414, rel=1e-3)
    without_seeds = make_report(*(make_run(name, None, mAP) for name, _, mAP in scores))
    difference = summaries(without_seeds)[1].difference
    assert difference is not None and difference.mean == pytest.approx(0.04) and difference.std is None


def test_a_mean_that_would_leave_a_seed_out_is_not_given() -> None:
    lacking = dataclasses.replace(make_run("deploy", 1, 0.4), metrics={"mAP": 0.4, "mAP50": None})
    report = make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.3), lacking)
    assert set(summaries(report)[1].metrics) == {"mAP"}
    assert headline_cells(report, summaries(report)[1])[4] == "-"


def test_one_seed_has_no_spread() -> None:
    report = make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.25))
    softmax, deploy = summaries(report)
    assert headline_cells(report, softmax)[2:4] == ("0.200", "baseline")
    assert headline_cells(report, deploy)[2:4] == ("0.250", "+0.050")


def test_a_failed_run_says_so_everywhere(tmp_path: Path) -> None:
    report = make_report(
        make_run("softmax", 0, 0.2),
        make_run("deploy", 0, 0.3),
        make_run("deploy", 1, None),
        make_run("linear", 0, None),
    )
    by_name = {summary.name: headline_cells(report, summary) for summary in summaries(report)}
    assert by_name["deploy"][:3] == ("deploy", "1 (FAILED: 1)", "0.300")
    assert by_name["linear"][:3] == ("linear", "0 (FAILED: 1)", "-")
    write_report(tmp_path, report)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "index.html").read_text()
    assert "- deploy (seed 1): FAILED: it \\| broke badly <here>" in text
    assert text.count("FAILED |") == 2, "each has its row"
    assert page.count("FAILED: it | broke\nbadly &lt;here&gt;") == 4
    assert read_report(tmp_path / "report.json") == report
    good = make_report(make_run("softmax", 0, 0.2), make_run("deploy", 0, 0.3))
    assert "FAILED" not in markdown(good) + html_page(good), "the control: nothing failed, nothing says so"


def test_what_is_missing_makes_a_failed_record_with_the_reason(tmp_path: Path) -> None:
    annotations, _ = write_data(tmp_path)
    write_demo(tmp_path / "runs", annotations, seeds=1)
    work_dir = tmp_path / "runs" / "seed0" / "softmax"
    assert build_run(RunSpec("softmax", work_dir)).ok
    lost = build_run(RunSpec("softmax", tmp_path / "nowhere"))
    assert lost.status == "failed" and "nowhere: no such folder" in str(lost.reason)
    untested = build_run(RunSpec("softmax", work_dir, test_dir=tmp_path / "untested"))
    assert "untested: no <time>/<time>.json" in str(untested.reason)
    assert untested.scalars, "what could be read is kept"
    path = work_dir / "20260101_100000" / "vis_data" / "scalars.json"
    path.write_text(path.read_text() + '{"loss": NaN, "iter": 210, "step": 210}\n')
    assert build_run(RunSpec("softmax", work_dir)).reason == "the training loss is not finite at iteration 210"
    (work_dir / "iter_200.pth").unlink()
    assert build_run(RunSpec("softmax", work_dir)).checkpoint is None


def test_a_detector_that_cannot_be_counted_keeps_its_scores_and_says_so(tmp_path: Path) -> None:
    write_test(tmp_path / "test", mAP=0.2)
    config = next((tmp_path / "test").glob("*/vis_data/config.py"))
    config.write_text(config.read_text().replace('type="FPN"', 'type="NoSuchNeck"'))
    run = build_run(RunSpec("a", tmp_path), shape=(64, 64))
    assert run.ok and "cannot be built" in run.notes[0] and "NoSuchNeck" in run.notes[0]
    config.write_text(config.read_text().replace('type="NoSuchNeck"', 'type="FPN"'))
    run = build_run(RunSpec("a", tmp_path), shape=(0, 64))
    assert run.ok and run.gmacs is None and "shape=(0, 64)" in run.notes[0]
    report = make_report(dataclasses.replace(run, name="softmax"), dataclasses.replace(run, name="deploy"))
    for text in (markdown(report), html_page(report)):
        assert "softmax, deploy: parameters and multiply-adds are not known" in text


def test_predictions_of_another_data_set_are_refused(tmp_path: Path) -> None:
    annotations, _ = write_data(tmp_path)
    data = Annotations(annotations)
    path = tmp_path / "predictions.bbox.json"
    write_predictions(path, annotations)
    assert set(data.detections(path)) == set(range(6))
    path.write_text(json.dumps([{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]))
    with pytest.raises(ValueError, match=r"image ids \[99\] are not in .*val\.json"):
        data.detections(path)
    with pytest.raises(ValueError, match="no images, annotations, categories"):
        Annotations(_dump(tmp_path / "a.json", {}))


def test_a_missing_image_is_named(demo: Demo, tmp_path: Path) -> None:
    report, _, specs = demo
    annotations, images = write_data(tmp_path)
    assert report.comparison is not None
    name = report.comparison.images[0].file_name
    (images / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf"{name}: cannot be decoded"):
        comparison_pictures(report, specs, Annotations(annotations), images)
    (images / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such image; give the folder .*--images"):
        comparison_pictures(report, specs, Annotations(annotations), images)


def test_latency_is_read_not_measured(tmp_path: Path) -> None:
    row = {"p50_ms": 12, "threads": 2, "device": "cpu", "input_shape": [64, 64]}
    latency = read_latency(_dump(tmp_path / "l.json", {"latency": {"deploy": row}}))
    assert latency["deploy"].source == str(tmp_path / "l.json") and latency["deploy"].peak_mib is None
    assert latency["deploy"].p50_ms == 12.0 and latency["deploy"].input_shape == (64, 64)
    report = make_report(
        make_run("softmax", 0, 0.2), dataclasses.replace(make_run("deploy", 0, 0.3), latency=latency["deploy"])
    )
    assert "64x64 pixels, 2 threads, cpu" in markdown(report) and "| 12.0" in markdown(report).replace("  ", "")
    with pytest.raises(ValueError, match=r"l\.json: deploy: fields of Latency differ: missing \['device'"):
        read_latency(_dump(tmp_path / "l.json", {"latency": {"deploy": {"p50_ms": 12}}}))
    with pytest.raises(ValueError, match=r'expected \{"latency"'):
        read_latency(_dump(tmp_path / "l.json", []))


def test_durations() -> None:
    assert [duration(value) for value in (12.4, 185, 7800)] == ["12 s", "3 min 05 s", "2 h 10 min"]


def _dump(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
