"""The demo itself, shortened: every command of it, on the real images, with MMDetection's own tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from castling_det.report.records import read_report

ROOT = Path(__file__).resolve().parents[2]
# Enough for scores over the threshold of a prediction: without one box there is no mAP to report.
MAX_ITERS = "60"
DATA = ROOT / "data" / "tree_crowns"

pytestmark = pytest.mark.skipif(not (DATA / "annotations" / "val.json").is_file(), reason="run make data")


def demo(work_dir, *options):
    command = [sys.executable, "tools/demo.py", "--work-dir", str(work_dir), "--max-iters", MAX_ITERS, *options]
    # One thread, so that a shared machine's other work does not decide how long this takes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("demo")
    result = demo(work_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    return work_dir, result


def test_writes_the_report(finished):
    work_dir, result = finished
    report = work_dir / "report"
    assert {"report.json", "report.md", "index.html"} <= {path.name for path in report.iterdir()}
    runs = {run.name: run for run in read_report(report / "report.json").runs}
    assert set(runs) == {"softmax", "castling", "deploy"}
    assert all(run.ok for run in runs.values())
    assert runs["deploy"].gmacs < runs["softmax"].gmacs
    assert "deploy" in result.stdout


def test_conversion_changes_no_detection(finished):
    """The mask is empty in the last iterations: boxes before and after conversion are the same bits."""
    work_dir, _ = finished
    before, after = (
        json.loads((work_dir / "seed0" / name / "test" / "predictions.bbox.json").read_text())
        for name in ("castling", "deploy")
    )
    assert before == after and len(before) > 0
    manifest = json.loads((work_dir / "seed0" / "deploy" / "deploy.json").read_text())
    assert manifest["mask"]["empty_by"] == "threshold"
    assert all(feature["max_abs"] == 0 for feature in manifest["drift"].values())


def test_a_second_run_does_nothing_again(finished):
    work_dir, _ = finished
    result = demo(work_dir)
    assert result.returncode == 0 and result.stdout.count("done before") == 7


def test_data_that_cannot_be_prepared_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = demo(tmp_path / "w", "--data-root", str(tmp_path / "nothing"))
    assert result.returncode == 1 and "pip could not download deepforest==2.1.0" in result.stderr
    assert "train.json is missing; it is written by" in result.stderr.splitlines()[-1]
