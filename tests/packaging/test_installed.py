"""The installed wheel, used from an empty folder through MMDetection's own tools."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.packaging.building import Environment, create_environment, run

CONFIG = "castling_vit/gfl_castling-vit-nano_castling_tree-crowns.py"
ITERATIONS = 4  # the fewest with an empty mask at the end


def host_file(path: str) -> Path:
    """A file of the installed MMDetection."""
    spec = find_spec("mmdet")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / path


def write_coco(folder: Path, images: int = 3) -> None:
    """Bright squares on noise, in the layout of the configs' data set."""
    generator = np.random.default_rng(0)
    annotations = []
    for split in ("train", "val"):
        folder.joinpath(split).mkdir(parents=True)
    for index in range(images):
        pixels = generator.integers(0, 90, (256, 256, 3), dtype=np.uint8)
        for number in range(4):
            x, y, side = (int(value) for value in generator.integers((0, 0, 24), (180, 180, 64)))
            pixels[y : y + side, x : x + side] = 230
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0, "category_id": 1}
            annotations.append({"id": index * 4 + number + 1, "image_id": index + 1, **box})
        for split in ("train", "val"):
            Image.fromarray(pixels).save(folder / split / f"{index}.png")
    records = [{"id": index + 1, "file_name": f"{index}.png", "width": 256, "height": 256} for index in range(images)]
    content = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    folder.joinpath("annotations").mkdir()
    for split in ("train", "val"):
        folder.joinpath("annotations", f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


USER_CONFIG = f"""
_base_ = 'castling_det::{CONFIG}'
model = dict(test_cfg=dict(score_thr=0.0))
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(data_root='data/'))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='data/'))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters={ITERATIONS}, val_interval={ITERATIONS})
default_hooks = dict(checkpoint=dict(interval={ITERATIONS}), logger=dict(interval=1))
"""


def test_mmdetections_own_train_tool(installed: Environment, tmp_path: Path) -> None:
    write_coco(tmp_path / "data")
    tmp_path.joinpath("mine.py").write_text(USER_CONFIG, encoding="utf-8")
    train = host_file(".mim/tools/train.py")
    done = run([installed.python, train, "mine.py", "--work-dir", "out"], tmp_path)
    (scalars,) = tmp_path.glob("out/*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == ITERATIONS and np.isfinite(losses).all()
    assert any("coco/bbox_mAP" in line for line in lines), "it was evaluated"
    assert tmp_path.joinpath("out", f"iter_{ITERATIONS}.pth").exists()
    assert (done.stdout + done.stderr).count("mmcv has no compiled operators") <= 1


def test_an_unknown_config_of_ours_is_named(installed: Environment, tmp_path: Path) -> None:
    tmp_path.joinpath("mine.py").write_text("_base_ = 'castling_det::castling_vit/none.py'\n", encoding="utf-8")
    code = "from mmengine.config import Config; Config.fromfile('mine.py')"
    with pytest.raises(AssertionError, match=r"FileNotFoundError.*castling_vit/none\.py"):
        run([installed.python, "-c", code], tmp_path)


def test_doctor_finds_no_problem(installed: Environment, tmp_path: Path) -> None:
    answer = run([installed.folder / "bin" / "castling-det", "doctor", "--json"], tmp_path).stdout
    findings = {entry["name"]: entry for entry in json.loads(answer)}
    assert all(entry["status"] != "problem" for entry in findings.values())
    assert str(installed.site_packages) in findings["castling_det"]["detail"]
    assert findings["start-up"]["status"] == findings["configs"]["status"] == "ok"


def test_a_checkout_on_the_path_comes_before_the_installed_package(installed: Environment, tmp_path: Path) -> None:
    tmp_path.joinpath("castling_det").mkdir()
    tmp_path.joinpath("castling_det", "__init__.py").write_text("mine = True\n", encoding="utf-8")
    run([installed.python, "-c", "import castling_det; assert castling_det.mine"], tmp_path)


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = create_environment(tmp_path / "venv")
    before = {path.name for path in environment.site_packages.iterdir()}
    environment.install(wheel)
    run([environment.python, "-c", "import castling_det"], tmp_path)
    environment.pip("uninstall", "--quiet", "--yes", "castling-det")
    assert {path.name for path in environment.site_packages.iterdir()} == before
    assert run([environment.python, "-c", "pass"], tmp_path).stderr == ""
