"""Runs of every form: test dirs, checkpoints, results files, runs that are not ours; their differences and speeds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from castling_det.config import load_config
from castling_det.report import Annotations, RunSpec, build_report, build_run, markdown
from castling_det.report.bootstrap import Matches, draw_images
from castling_det.report.record import Report
from castling_det.report.speed import Benchmarks
from tests.report.conftest import Demo
from tests.report.samples import write_benchmark, write_data, write_predictions, write_session, write_test


def _predicted(root: Path, names: tuple[str, ...] = ("a", "b")) -> tuple[Annotations, list[Path]]:
    """Results files on six images, each worse than the one before."""
    annotations, _ = write_data(root)
    paths = [root / f"{name}.json" for name in names]
    for skip, path in enumerate(paths):
        write_predictions(path, annotations, skip=skip, seed=skip)
    return Annotations(annotations), paths


def _report(specs: list[RunSpec], annotations: Annotations, **options: int) -> Report:
    return build_report(
        specs, baseline="a", deployed="b", annotations=annotations, created_by="x", **{"resamples": 50, **options}
    )


def test_results_files_alone_are_runs(tmp_path: Path) -> None:
    annotations, paths = _predicted(tmp_path)
    report = _report([RunSpec.parse(f"{path.stem}={path},seed=3") for path in paths], annotations)
    assert not report.failed
    a, b = report.runs
    assert a.work_dir is None and a.config is None and a.seed == 3
    assert str(a.metrics_source).startswith("a.json by ") and (a.metrics["mAP"] or 0) > (b.metrics["mAP"] or 0) > 0
    assert a.precision["tree"][0] > 0 and report.comparison is not None and report.comparison.seed == 3
    assert "b" in markdown(report)


def test_the_difference_is_the_mean_over_seeds_on_the_same_draws(tmp_path: Path) -> None:
    annotations, paths = _predicted(tmp_path, ("a", "b", "c", "d"))
    a0, b0, a1, b1 = paths
    specs = [RunSpec("a", None, predictions=a0, seed=0), RunSpec("b", None, predictions=b0, seed=0),
             RunSpec("b", None, predictions=b1, seed=1), RunSpec("a", None, predictions=a1, seed=1)]  # fmt: skip
    (found,) = _report(specs, annotations, resamples=80, bootstrap_seed=5).differences
    scores = {path: Matches(annotations.document, annotations.results(path)) for path in paths}
    expected = [
        np.mean([scores[b].mean_average_precision(counts) - scores[a].mean_average_precision(counts)
                 for a, b in ((a0, b0), (a1, b1))])
        for counts in draw_images(6, 80, 5)
    ]  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))
    whole = {path: score.mean_average_precision() for path, score in scores.items()}
    assert found.value == pytest.approx((whole[b0] - whole[a0] + whole[b1] - whole[a1]) / 2)
    assert (found.name, found.pairs, found.images, found.resamples, found.bootstrap_seed) == ("b", 2, 6, 80, 5)
    assert _report(specs, annotations, resamples=0).differences == ()
    unpaired = [dataclasses.replace(spec, seed=None) for spec in specs]
    assert _report(unpaired, annotations).differences == (), "which belongs to which is not known"
    with pytest.raises(ValueError, match="resamples=-1"):
        _report(specs, annotations, resamples=-1)


def test_predictions_of_another_test_are_not_mixed_in(tmp_path: Path) -> None:
    annotations, (path, _) = _predicted(tmp_path)
    write_test(tmp_path / "run" / "test", mAP=0.123)
    shutil.copy(path, tmp_path / "run" / "test" / "predictions.bbox.json")
    run = build_run(RunSpec("a", tmp_path / "run"), annotations=annotations)
    assert run.ok and run.metrics["mAP"] == 0.123 and not run.precision
    assert "not of the same test" in run.notes[0] and "recorded 0.123" in run.notes[0]
    other = RunSpec("b", None, predictions=path)
    report = _report([RunSpec("a", tmp_path / "run"), other], annotations)
    assert not report.differences and report.comparison is None


def test_a_results_file_of_other_data_is_a_failed_row(tmp_path: Path) -> None:
    annotations, (good, bad) = _predicted(tmp_path)
    rows = json.loads(bad.read_text())
    for field, value in (("image_id", 99), ("category_id", 5)):
        bad.write_text(json.dumps([{**row, field: value} for row in rows]))
        report = _report([RunSpec.parse(f"a={good}"), RunSpec.parse(f"b={bad}")], annotations)
        assert [run.name for run in report.failed] == ["b"]
        assert f"{field.removesuffix('_id')} ids [{value}] are not in" in str(report.failed[0].reason)
        assert "b: FAILED" in markdown(report)
    bad.write_text('[{"image_id": 1}]')
    assert "expected a COCO results file" in str(build_run(RunSpec.parse(f"b={bad}"), annotations=annotations).reason)
    lost = build_run(RunSpec.parse(f"b={tmp_path / 'none.json'}"), annotations=annotations)
    assert "none.json: not a readable JSON file" in str(lost.reason)
    assert "need the annotations" in str(build_run(RunSpec.parse(f"b={good}")).reason)


def test_a_run_of_any_detector_by_default_settings_of_mmdetection(tmp_path: Path) -> None:
    """tools/test.py without --work-dir writes beside the training; other prefixes name other results files."""
    annotations, (path, _) = _predicted(tmp_path)
    work_dir = tmp_path / "faster-rcnn_r50_fpn_1x_mine"
    write_session(work_dir, "20260101_100000", range(10, 201, 10))
    untested = build_run(RunSpec("a", work_dir), annotations=annotations)
    assert untested.ok and untested.metrics_source == "the validation at iteration 200"
    assert untested.metrics["mAP"] == untested.validation["mAP"].values[-1]
    assert "tools/test.py was not run" in untested.notes[0] and untested.attention is None
    (work_dir / "test").mkdir()
    broken = build_run(RunSpec("a", work_dir), annotations=annotations)
    assert not broken.ok and "no <time>/<time>.json" in str(broken.reason), "a test that left nothing has failed"
    (work_dir / "test").rmdir()
    shutil.copy(path, work_dir / "results.bbox.json")
    metrics = build_run(RunSpec.parse(f"a={path}"), annotations=annotations).metrics
    write_test(work_dir, mAP=0, metrics=metrics)
    tested = build_run(RunSpec("a", work_dir), annotations=annotations)
    assert tested.ok and tested.metrics_source == "tools/test.py" and not tested.notes
    assert tested.precision and tested.iterations == 200 and tested.scalars["loss"].steps


def test_a_checkpoint_is_a_run_with_the_test_beside_it(tmp_path: Path) -> None:
    write_test(tmp_path / "test", mAP=0.2)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(name.encode())
    run = build_run(RunSpec.parse(f"a={tmp_path / 'b.pth'}"))
    assert run.ok and run.metrics["mAP"] == 0.2 and run.checkpoint == str(tmp_path / "b.pth")
    assert run.checkpoint_sha256 is not None


def test_speed_is_read_from_a_benchmark_of_the_same_detector(demo: Demo, tmp_path: Path) -> None:
    softmax, castling, deploy = demo.report.runs[:3]
    assert softmax.latency is not None and deploy.latency is not None
    assert softmax.latency.p50_ms == pytest.approx(1e-4 * 64**2) and deploy.latency.p50_ms == pytest.approx(2e-3 * 64)
    assert deploy.latency.input_shape == (128, 128), "of two sizes the one that GMACs are counted at"
    assert castling.latency == deploy.latency and deploy.latency.threads == 2 and deploy.latency.peak_mib == 128
    detector, core = demo.report.speed
    assert (detector.level, core.level, len(core.points)) == ("detector", "core", 6)
    assert core.crossover_tokens is None and "64, the smallest" in core.crossover_note
    assert detector.crossover_tokens == pytest.approx(20, abs=1)
    config = load_config(str(deploy.config))
    other = Benchmarks([write_benchmark(tmp_path / "other", attention_options=", patch_size=8")])
    latency, notes = other.latency(config, (128, 128))
    assert latency is None and "is another one" in notes[0] and "benchmark.json" in notes[0]
    same = Benchmarks([write_benchmark(tmp_path / "same", attention_options=", drop_path_rate=0.1")])
    nearest = same.latency(config, (70, 70))[0]
    assert nearest is not None and nearest.input_shape == (64, 64)
    largest = same.latency(config, None)[0]
    assert largest is not None and largest.input_shape == (128, 128)
    config.model.backbone.pop("attention")
    assert same.latency(config, (64, 64)) == (None, []), "a detector that is not ours"


def test_a_latency_of_no_run_is_refused(tmp_path: Path) -> None:
    annotations, paths = _predicted(tmp_path)
    with pytest.raises(ValueError, match=r"latency: \['c'\] are no runs; expected some of \['a', 'b'\]"):
        build_report([RunSpec.parse(f"{path.stem}={path}") for path in paths], baseline="a", deployed="b",
                     annotations=annotations, created_by="x", latency={"c": None})  # type: ignore[dict-item]  # fmt: skip
