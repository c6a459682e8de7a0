"""tools/benchmarks/deployed.py: mAP of exported files, and latency in processes that take turns."""

from __future__ import annotations

import json
import runpy

import cv2
import pytest

from castling_det.runtime.detector import Detector
from tests.export.conftest import tiny_config
from tests.runtime.conftest import ROOT, photo, spot_model

deployed = runpy.run_path(str(ROOT / "tools" / "benchmarks" / "deployed.py"), run_name="deployed")
Accuracy, main = deployed["Accuracy"], deployed["main"]


@pytest.fixture
def test_set(tmp_path):
    """Three photos with the boxes that the file finds in them, and one box that it does not."""
    model = spot_model(tmp_path / "spot.onnx")
    images, boxes = [], []
    for index in range(3):
        image = photo(spot=(10 + index, 30), seed=index)
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
        images.append({"id": index + 5, "file_name": f"{index}.png", "height": 48, "width": 64})
        (entry,) = Detector(model)(image).to_coco(index + 5, (7, 9))
        boxes.append({**entry, "id": index + 1, "area": 64, "iscrowd": 0})
    boxes.append({**boxes[0], "id": 9, "bbox": [50, 30, 9, 9]})
    categories = [{"id": 9, "name": "spot"}, {"id": 7, "name": "leaf"}]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "test.json").write_text(json.dumps(document))
    return model


def test_one_file_gives_its_map(test_set, tmp_path):
    found = deployed["evaluate"](test_set, tmp_path / "test.json", tmp_path)
    assert (found.runtime, found.precision, found.difference) == ("onnxruntime", "float32", 0.0)
    assert found.map == pytest.approx(0.75, abs=0.01) and found.map50 == pytest.approx(found.map), "three of four boxes"
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "leaf"}]}')
    with pytest.raises(ValueError, match="no category spot, which the detector knows"):
        deployed["evaluate"](test_set, tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("precision", "difference", "problem"),
    [("float32", -0.002, "mAP differs by -0.0020, allowed 0.001"), ("float16", 0.004, ""), ("int8", -0.2, "")],
)
def test_each_precision_has_its_limit(precision, difference, problem):
    row = Accuracy("x.onnx", "onnxruntime", precision, 10, 0.1, 0.2, difference)
    assert problem in row.problem and bool(row.problem) == bool(problem)
    assert deployed["table"]([row]).count("x.onnx") == 1 + bool(problem)


def test_subjects_take_turns_in_fresh_processes(test_set, tmp_path, capfd, monkeypatch):
    config = tmp_path / "tiny.py"
    tiny_config("gfl_vit").dump(config)
    subjects = [str(test_set), f"{config}:linear", f"{config}:banana"]
    seen, run = [], deployed["subprocess"].run

    def watched(command, **options):
        if "worker" in command:
            seen.append(command[3])
        return run(command, **options)

    monkeypatch.setattr(deployed["subprocess"], "run", watched)
    options = ["--sizes", "64", "--rounds", "2", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path / "out")]
    assert main(["latency", *subjects, *options]) == 1, "one subject fails"
    assert seen == [*subjects, *subjects[:2]], "A B A B"
    said = capfd.readouterr().out
    record = json.loads((tmp_path / "out" / "latency.json").read_text())
    onnx, torch, failed = record["rows"]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["problem"] == "" for row in (onnx, torch))
    assert len(onnx["rounds_p50_ms"]) == len(torch["rounds_p50_ms"]) == 2
    assert failed["p50_ms"] is None and "expected an .onnx file, CONFIG:linear or CONFIG:softmax" in failed["problem"]
    assert (tmp_path / "out" / "latency.md").read_text() + "\n" == said and "failed" in said


@pytest.mark.slow
def test_both_attentions_in_both_runtimes(tmp_path, capfd):
    pytest.importorskip("onnxscript")
    config = tmp_path / "tiny.py"
    tiny_config("gfl_vit").dump(config)
    assert main(["attentions", str(config), "--sizes", "64", "--rounds", "1", "--seconds", "0.01"]) == 0
    assert capfd.readouterr().out.count("| 64 |") == 4


def test_refusals_are_one_line(tmp_path, capsys):
    assert main(["accuracy", str(tmp_path / "none.py"), "x.pth", "x.onnx"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("deployed: config") and said.count("\n") == 1
