"""Runs of every form: work dirs, checkpoints, results files, runs that are not ours; what is missing in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from castling_det.report.build import build_report, with_costs
from castling_det.report.evaluation import Annotations, draw_images, mean_average_precisions
from castling_det.report.records import Counts, Report
from castling_det.report.render import html_page, markdown
from castling_det.report.runs import RunSpec, build_run
from tests.report.conftest import Demo
from tests.report.samples import make_report, write_data, write_demo, write_predictions, write_session, write_test


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
    draws = draw_images(6, 80, 5)
    scores = {p: mean_average_precisions(annotations.document, annotations.results(p), draws) for p in paths}
    value, *drawn = (scores[b0] - scores[a0] + scores[b1] - scores[a1]) / 2
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found.value == pytest.approx(value)
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
    lost = build_run(RunSpec.parse(f"b={tmp_path / 'none.json'}"), annotations=annotations)
    assert "none.json: not readable as a COCO results file" in str(lost.reason)
    assert "need the annotations" in str(build_run(RunSpec.parse(f"b={good}")).reason)


def test_a_run_of_any_detector_by_default_settings_of_mmdetection(tmp_path: Path) -> None:
    """tools/test.py without --work-dir writes beside the training; other prefixes name other results files."""
    annotations, (path, _) = _predicted(tmp_path)
    work_dir = tmp_path / "faster-rcnn_r50_fpn_1x_mine"
    write_session(work_dir, "20260101_100000", range(10, 201, 10))
    untested = build_run(RunSpec("a", work_dir), annotations=annotations)
    assert untested.ok and untested.metrics_source == "the validation at iteration 200"
    assert untested.metrics["mAP"] == pytest.approx(untested.validation.values[-1], rel=1e-4)
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
    assert tested.precision and tested.iterations == 200 and tested.loss.steps


def test_a_checkpoint_is_a_run_with_the_test_beside_it(tmp_path: Path) -> None:
    write_test(tmp_path / "test", mAP=0.2)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(name.encode())
    run = build_run(RunSpec.parse(f"a={tmp_path / 'b.pth'}"))
    assert run.ok and run.metrics["mAP"] == 0.2 and run.checkpoint == str(tmp_path / "b.pth")
    assert run.checkpoint_sha256 is not None


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
    assert castling.mask.empty_from == deploy.mask.empty_from == 160 and softmax.mask.empty_from is None
    drawn = [run.name for run in report.runs if run.mask.kept_fraction and run.mask.kept_mass]
    assert drawn == ["castling"], "one run's curves are enough"
    assert deploy.loss == castling.loss and deploy.loss.steps, "from the training that the manifest names"
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


def test_what_is_missing_makes_a_failed_record_with_the_reason(tmp_path: Path) -> None:
    annotations, _ = write_data(tmp_path)
    write_demo(tmp_path / "runs", annotations, seeds=1)
    work_dir = tmp_path / "runs" / "seed0" / "softmax"
    assert build_run(RunSpec("softmax", work_dir)).ok
    lost = build_run(RunSpec("softmax", tmp_path / "nowhere"))
    assert not lost.ok and "nowhere: no such folder" in str(lost.reason)
    untested = build_run(RunSpec("softmax", work_dir, test_dir=tmp_path / "untested"))
    assert "untested: no <time>/<time>.json" in str(untested.reason)
    assert untested.loss.steps, "what could be read is kept"
    path = work_dir / "20260101_100000" / "vis_data" / "scalars.json"
    path.write_text(path.read_text() + '{"loss": NaN, "iter": 210, "step": 210}\n')
    assert build_run(RunSpec("softmax", work_dir)).reason == "the training loss is not finite at iteration 210"
    (work_dir / "iter_200.pth").unlink()
    assert build_run(RunSpec("softmax", work_dir)).checkpoint is None


def test_a_detector_that_cannot_be_counted_keeps_its_scores_and_says_so(tmp_path: Path) -> None:
    write_test(tmp_path / "test", mAP=0.2)
    config = next((tmp_path / "test").glob("*/vis_data/config.py"))
    config.write_text(config.read_text().replace('type="FPN"', 'type="NoSuchNeck"'))
    run = with_costs(build_run(RunSpec("a", tmp_path)), (64, 64), {})
    assert run.ok and "cannot be built" in run.notes[0] and "NoSuchNeck" in run.notes[0]
    config.write_text(config.read_text().replace('type="NoSuchNeck"', 'type="FPN"'))
    run = with_costs(build_run(RunSpec("a", tmp_path)), (0, 64), {})
    assert run.ok and run.gmacs is None and "shape=(0, 64)" in run.notes[0]
    report = make_report(dataclasses.replace(run, name="softmax"), dataclasses.replace(run, name="deploy"))
    for text in (markdown(report), html_page(report)):
        assert "softmax, deploy: parameters and multiply-adds are not known" in text


def test_a_run_argument() -> None:
    assert RunSpec.parse("a=b/c") == RunSpec("a", Path("b/c"))
    spec = RunSpec.parse("a=b,test=t,train=s,config=c.py,checkpoint=x.pth,seed=3")
    assert spec == RunSpec("a", Path("b"), Path("t"), Path("s"), Path("c.py"), Path("x.pth"), 3)
    assert RunSpec.parse("a=b/x.pth") == RunSpec("a", Path("b"), checkpoint=Path("b/x.pth"))
    assert RunSpec.parse("a=b/p.json,seed=1") == RunSpec("a", None, predictions=Path("b/p.json"), seed=1)
    assert RunSpec.parse("a=b").test == Path("b/test")


WRONG = ["a", "=b", "a=", "a=b,tests=t", "a=b,test", "a=b,test=", "a=b,seed=x", "a=b,seed=²", "a=b,seed=1,seed=2",
         "a=b.pth,checkpoint=c"]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_run_argument_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--run"):
        RunSpec.parse(text)
