"""`castling-det[runtime]`: the wheel and what it declares for that extra, nothing else, run an exported detector."""

from __future__ import annotations

import json
import sys
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.packaging.building import Environment, run
from tests.packaging.test_distributions import contents, dist_info

HEAVY = ("torch", "torchvision", "timm", "matplotlib", "mmengine", "mmcv", "mmdet", "rich", "PIL")


def declared(wheel: Path, extra: str) -> set[str]:
    """Distributions that `pip install castling-det[extra]` would bring, by following what each of them asks for."""
    metadata = Parser().parsestr(dist_info(contents(wheel), "METADATA"))
    pending = [(Requirement(line), extra) for line in metadata.get_all("Requires-Dist") or []]
    found: set[str] = set()
    while pending:
        requirement, within = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": within}):
            continue
        assert requirement.specifier.contains(distribution(requirement.name).version), str(requirement)
        if requirement.name not in found:
            found.add(requirement.name)
            pending += [(Requirement(line), "") for line in distribution(requirement.name).requires or []]
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and the declared distributions, linked from the running one, and no others."""
    folder = tmp_path_factory.mktemp("runtime") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    environment = Environment(folder)
    environment.install(wheel)
    for name in declared(wheel, "runtime"):
        for file in distribution(name).files or ():
            top = file.parts[0]
            link = environment.site_packages / top
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(Path(str(distribution(name).locate_file(top))))
    return environment


def test_the_extra_declares_neither_torch_nor_mmdetection(wheel: Path) -> None:
    names = {name.lower() for name in declared(wheel, "runtime")}
    assert {"numpy", "onnxruntime", "opencv-python-headless"} <= names
    assert not names & {name.lower() for name in HEAVY}
    assert declared(wheel, "") == {"numpy"}


def test_the_training_extras_are_complete(wheel: Path) -> None:
    metadata = Parser().parsestr(dist_info(contents(wheel), "METADATA"))
    assert {"runtime", "sahi", "train"} <= set(metadata.get_all("Provides-Extra") or [])
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    for host in ("onedl", "upstream"):
        of_host = [line for line in lines if line.marker is not None and line.marker.evaluate({"extra": host})]
        assert any(line.name == "castling-det" and line.extras == {"train"} for line in of_host)
    training = {line.name for line in lines if line.marker is not None and line.marker.evaluate({"extra": "train"})}
    report = {"faster-coco-eval", "jinja2", "matplotlib", "msgspec"}
    assert training == report | {"pillow", "rich", "safetensors", "timm", "torch", "torchvision"}


def test_an_exported_detector_runs_in_a_clean_environment(clean: Environment, tmp_path: Path) -> None:
    import cv2

    from tests.runtime.conftest import photo, spot_model

    model = spot_model(tmp_path / "spot.onnx")
    cv2.imwrite(str(tmp_path / "photo.png"), photo())
    tool = clean.site_packages / "castling_det" / ".mim" / "tools" / "detect.py"
    said = run([clean.python, tool, model, "photo.png", "--out", "out"], tmp_path)
    assert "1 detections in 1 images" in said.stdout and said.stderr == ""
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry["category_id"] == 2 and (tmp_path / "out" / "pictures" / "photo.png").is_file()
    code = (
        "import castling_det; print(castling_det.Detector('spot.onnx')('photo.png').names)\n"
        "import importlib.util as u; print([n for n in " + repr(HEAVY) + " if u.find_spec(n)])"
    )
    assert run([clean.python, "-c", code], tmp_path).stdout.split("\n")[:2] == ["('spot',)", "[]"]


def test_the_detector_of_the_package_finds_notes_in_the_first_minute(clean: Environment, tmp_path: Path) -> None:
    """Four staves of eight notes, drawn here: no font and no engraver that the detector was trained on."""
    import cv2
    import numpy as np

    page = np.full((1280, 931, 3), 255, np.uint8)
    for top in range(200, 1000, 200):
        for line in range(5):
            cv2.line(page, (80, top + 11 * line), (850, top + 11 * line), (0, 0, 0), 1)
        for note in range(8):
            x, y = 140 + 85 * note, top + 11 * (note % 5)
            cv2.ellipse(page, (x, y), (7, 5), -20, 0, 360, (0, 0, 0), -1, cv2.LINE_AA)
            cv2.line(page, (x + 6, y), (x + 6, y - 38), (0, 0, 0), 1)
    cv2.imwrite(str(tmp_path / "page.png"), page)
    said = run([clean.python, "-m", "castling_det", "detect", "page.png", "--score-thr", "0.5"], tmp_path)
    assert "detections in 1 images" in said.stdout and said.stderr == ""
    doctor = run([clean.python, "-m", "castling_det", "doctor"], tmp_path).stdout
    assert "problem" not in doctor and "scores-nano loads, 12 classes" in doctor and "torch" not in doctor
    entries = json.loads((tmp_path / "detections" / "predictions.json").read_text())
    classes = json.loads((tmp_path / "detections" / "images.json").read_text())["categories"]
    (notehead,) = (row["id"] for row in classes if row["name"] == "noteheadBlack")
    assert sum(entry["category_id"] == notehead for entry in entries) == 32
