"""The maintainers' scripts: numerics, model zoo, picture of the mask, stability."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
import torch
from PIL import Image

from castling_det.config import load_config
from castling_det.report.complexity import detector_complexity
from castling_det.report.records import MaskOccupancy, RunRecord, Series, write_report_json
from tests.report.samples import make_report, make_run, write_session
from tools.benchmarks import numerics
from tools.dev import mask_picture, model_zoo, stability

ROOT = Path(__file__).parents[2]
NANO = "gfl_castling-vit-nano"


def test_numerics_errors_are_those_of_the_dtype(tmp_path, capsys):
    out = tmp_path / "numerics.json"
    assert numerics.main(["--out", str(out), "--tokens", "49", "--dtypes", "float32", "float16"]) == 0
    report = numerics.read_numerics(out)
    assert len(report.rows) == 2 * 2 * len(numerics.INPUTS) * 2
    bounds = {"float32": (1e-5, 1e-4), "float16": (1e-3, 5e-3)}
    for row in report.rows:
        assert row.finite
        assert 0 < row.out_rms < bounds[row.dtype][0] and 0 < row.grad_rms < bounds[row.dtype][1], row
    assert capsys.readouterr().out.strip() == numerics.numerics_markdown(report).strip()


def test_numerics_do_not_average_a_nan_away(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(numerics.INPUTS, "zero tokens", lambda qkv: qkv.fill_(torch.inf))
    assert numerics.main(["--out", str(tmp_path / "n.json"), "--tokens", "9", "--dtypes", "float16"]) == 1
    assert "NO: zero tokens" in capsys.readouterr().out


def test_the_zoo_counts_both_configs(tmp_path, capsys):
    out = tmp_path / "zoo.json"
    assert model_zoo.main(["--out", str(out), "--match", NANO]) == 0
    (model,) = model_zoo.read_zoo(out).models
    for attention, gmacs in (("softmax", model.gmacs_softmax), ("linear", model.gmacs_linear)):
        config = load_config(ROOT / "configs" / "castling_vit" / f"{NANO}_{attention}_8xb16-100e_coco.py")
        assert gmacs == detector_complexity(config, model.shape).gmacs
    assert model.gmacs_linear < model.gmacs_softmax and capsys.readouterr().out.count(f"| {NANO}") == 2


def test_the_zoo_has_windows_and_says_what_it_cannot_count():
    models = (
        model_zoo.ZooModel("f", "m", "r", (1, 1), 1, 3e0, 1e0, 2e0),
        model_zoo.ZooModel("f", "n", "r", (1, 1), None, None, None, reason="cannot be built"),
    )
    text = model_zoo.zoo_markdown(model_zoo.ModelZoo("test", models))
    rows = [[cell.strip() for cell in line.split("|")[3:6:2]] for line in text.splitlines()[2:7]]
    assert rows[:3] == [["softmax", "3.00"], ["softmax, windows", "2.00"], ["linear", "1.00"]]
    assert rows[3:] == [["softmax", "-"], ["linear", "-"]] and "- `n`: cannot be built" in text


def test_the_committed_zoo_counts_every_model():
    zoo = model_zoo.read_zoo(ROOT / "results" / "model_zoo.json")
    names = {path.stem.partition("_softmax_")[0] for path in model_zoo.zoo_models(ROOT / "configs")}
    assert {model.name for model in zoo.models} == names >= {NANO, "picodet_castling-levit-128s"}
    assert not [model.name for model in zoo.models if model.gmacs_softmax is None or model.reason is not None]


def test_the_mask_picture_shows_schedules_and_record(tmp_path, monkeypatch, capsys):
    drawn, plot = {}, matplotlib.axes.Axes.plot

    def spy(axes, x, y, **options):
        drawn[options["label"]] = np.array(x, float), np.array(y, float)
        return plot(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    mask = MaskOccupancy(kept_fraction={"blocks.0": Series((1, 2, 3), (0.5, None, 0.0))})
    run = RunRecord("castling", seed=0, mask=mask)
    report = make_report(make_run("softmax", 0, 0.1), run, make_run("deploy", 0, 0.1))
    write_report_json(tmp_path / "report.json", report)
    options = ["--end", "64", "--begin", "0.1", "--empty-from", "0.5"]
    assert mask_picture.main([str(tmp_path / "report.json"), "castling", str(tmp_path / "m.png"), *options]) == 0
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.width > 2 * picture.height > 400
    progress, threshold = drawn["geometric"]
    np.testing.assert_allclose(np.interp(0.3, progress, threshold), 8.0, rtol=1e-2)  # half of the way from 1 to 64
    assert np.all(threshold[progress <= 0.1] == 1.0) and progress.max() < 0.5
    assert {"constant", "linear", "cosine"} < set(drawn)
    np.testing.assert_array_equal(drawn["blocks.0"], [[1, 2, 3], [0.5, np.nan, 0.0]])
    assert mask_picture.main([str(tmp_path / "report.json"), "softmax", str(tmp_path / "n.png"), *options]) == 1
    assert "'softmax': expected one of" in capsys.readouterr().err and not (tmp_path / "n.png").exists()


def log_with(tmp_path, change, *, precision):
    """What is recorded of a session in which `change(row)` edits every row of an iteration."""
    write_session(tmp_path, "20260101_100000", range(1, 201), total=200, mask=True)
    (path,) = tmp_path.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stability.record(tmp_path, precision=precision, batch_size=1, command="here")


@pytest.mark.parametrize(
    ("precision", "name", "not_finite", "skipped"),
    [("fp16", "grad_norm", 0, 2), ("bf16", "grad_norm", 2, 0), ("fp16", "loss", 2, 0), ("fp16", None, 0, 0)],
)
def test_only_an_overflow_of_float16_is_no_fault(tmp_path, precision, name, not_finite, skipped):
    def fault(row):
        if name and row["step"] in (7, 9):
            row[name] = float("nan")

    found = log_with(tmp_path, fault, precision=precision)
    assert (found["not_finite"], found["skipped_steps"], found["max_grad_norm"]) == (not_finite, skipped, 1.5)
    assert {"loss", "grad_norm", "lr"} < set(found["traces"])
    assert all(len(trace["steps"]) <= 50 for trace in found["traces"].values())
    assert found["traces"]["loss"]["steps"][-1] == 200


def test_half_precision_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stability.main(["--precision", "fp16"]) == 1
    assert "AmpOptimWrapper trains on a GPU only" in capsys.readouterr().err
