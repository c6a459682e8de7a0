"""`check_dataset`: all that is wrong with a config and its data at once; the command, the demo and the hook use it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

import castling_det
from castling_det.engine import ClassCountHook
from castling_det.registry import HOOKS

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": (64, 48), "keep_ratio": True},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "PackDetInputs", "meta_keys": ("img_id", "img_shape", "ori_shape", "scale_factor")},
]


def coco(name: str = "tree") -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 30, 28], "area": 840, "iscrowd": 0}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": name}],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "img").mkdir(parents=True)
    for i in (1, 2):
        Image.new("RGB", (64, 48), (40 * i, 90, 20)).save(root / "img" / f"{i}.png")
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(coco()))
    return root


def loader(root: Path, split: str) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {
            "type": "castling_det.CheckedCocoDataset",
            "data_root": str(root),
            "ann_file": f"{split}.json",
            "data_prefix": {"img": "img/"},
            "metainfo": {"classes": ("tree",)},
            "test_mode": split == "val",
            "pipeline": copy.deepcopy(PIPELINE),
        },
    }


def sound(root: Path) -> Config:
    """A detector that trains in milliseconds."""
    from tests.conversion.conftest import _TINY

    model = copy.deepcopy(_TINY["model"])
    model["bbox_head"]["num_classes"] = 1
    return Config(
        {
            "default_scope": "mmdet",
            "model": model,
            "train_dataloader": loader(root, "train"),
            "val_dataloader": loader(root, "val"),
            "test_dataloader": loader(root, "val"),
            "val_evaluator": {"type": "CocoMetric", "ann_file": str(root / "val.json"), "metric": "bbox"},
            "test_evaluator": {"type": "CocoMetric", "ann_file": str(root / "val.json"), "metric": "bbox"},
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 2, "val_interval": 2},
            "val_cfg": {"type": "ValLoop"},
            "test_cfg": {"type": "TestLoop"},
            "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 1e-3}},
            "default_hooks": {
                "checkpoint": {"type": "CheckpointHook", "interval": 100, "save_last": False, "by_epoch": False}
            },
            "custom_hooks": [{"type": "castling_det.ClassCountHook"}],
            "env_cfg": {"mp_cfg": {"opencv_num_threads": 0}},
        }
    )


def test_a_sound_config_has_no_problem(data: Path) -> None:
    config = sound(data)
    before = config.to_dict()
    assert castling_det.check_dataset(config, level="pixels") == []
    assert config.to_dict() == before


def _set(field: str, value: Any) -> Callable[[Config], None]:
    return lambda config: config.merge_from_dict({field: value})


# What is changed in the config: the field and the message of the one problem.
FAULTS: dict[str, tuple[Callable[[Config], None], str, str]] = {
    "num_classes": (_set("model.bbox_head.num_classes", 80), "model.bbox_head.num_classes", "is 80, but train_"),
    "metainfo": (
        lambda c: [
            c[f"{s}_dataloader"]["dataset"].update(metainfo={"classes": ("oak",)}) for s in ("train", "val", "test")
        ],
        "train_dataloader.dataset.metainfo['classes']",
        "1 of its 1 names are no category",
    ),
    "metainfo of one loader": (
        lambda c: c.val_dataloader.dataset.update(metainfo={"classes": ("tree", "oak")}),
        "val_dataloader.dataset.metainfo['classes']",
        "but train_dataloader.dataset 'tree'",
    ),
    "no metainfo": (
        lambda c: c.train_dataloader.dataset.pop("metainfo"),
        "train_dataloader.dataset.metainfo['classes']",
        "80 of its 80 names",
    ),
    "ann_file": (
        _set("train_dataloader.dataset.ann_file", "x.json"),
        "train_dataloader.dataset.ann_file",
        "not a file",
    ),
    "data_prefix": (
        _set("val_dataloader.dataset.data_prefix.img", "pictures/"),
        "val_dataloader.dataset.data_prefix['img']",
        "2 of 2 image files",
    ),
    "evaluator of another file": (
        lambda c: c.val_evaluator.update(ann_file=c.val_evaluator.ann_file.replace("val", "train")),
        "val_evaluator.ann_file",
        "is another file than val_dataloader reads",
    ),
    "evaluator of no file": (_set("val_evaluator.ann_file", "nothing.json"), "val_evaluator.ann_file", "is not a file"),
    "wrapped": (
        lambda c: c.train_dataloader.update(
            dataset={
                "type": "RepeatDataset",
                "times": 2,
                "dataset": {**c.train_dataloader.dataset, "ann_file": "x.json"},
            }
        ),
        "train_dataloader.dataset.dataset.ann_file",
        "is not a file",
    ),
    "concatenated": (
        lambda c: c.train_dataloader.update(
            dataset={
                "type": "ConcatDataset",
                "datasets": [c.val_dataloader.dataset.to_dict(), {**c.val_dataloader.dataset, "ann_file": "x.json"}],
            }
        ),
        "train_dataloader.dataset.datasets[1].ann_file",
        "is not a file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_disagreement_is_named_by_its_field(data: Path, fault: str) -> None:
    config = sound(data)
    spoil, field, message = FAULTS[fault]
    spoil(config)
    found = castling_det.check_dataset(config)
    assert any(p.severity == "error" and p.field == field and message in p.message and p.fix for p in found), found


def test_all_problems_come_at_once_and_a_file_once(data: Path) -> None:
    config = sound(data)
    for fault in ("num_classes", "data_prefix", "evaluator of another file"):
        FAULTS[fault][0](config)
    config.test_dataloader = copy.deepcopy(config.val_dataloader)
    fields = [problem.field for problem in castling_det.check_dataset(config)]
    assert fields == [
        "val_dataloader.dataset.data_prefix['img']",
        "model.bbox_head.num_classes",
        "val_evaluator.ann_file",
    ]


def test_num_classes_of_other_things_is_left_alone(data: Path) -> None:
    config = sound(data)
    config.model.backbone.num_classes = 1000
    config.model.rpn_head = {"num_classes": 7}
    assert castling_det.check_dataset(config) == []


def test_a_coco_file_alone(data: Path) -> None:
    assert castling_det.check_dataset(data / "val.json", classes=("tree",), image_root=data / "img") == []
    (problem,) = castling_det.check_dataset(data / "val.json", classes=("oak",))
    assert problem.field == "dataset.metainfo['classes']"


def test_wrong_arguments(data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("model = dict(")
    for source, options, message in [
        (data / "val.json", {"level": "all"}, "level='all'"),
        (tmp_path / "none.py", {}, "none.py: no such file"),
        (tmp_path / "broken.py", {}, "cannot be read"),
        (sound(data), {"classes": ("tree",)}, "for a COCO .json file"),
    ]:
        with pytest.raises(ValueError, match=message):
            castling_det.check_dataset(source, **options)


def run_tool(*arguments: object, tool: str = "check_dataset") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_prints_everything_and_its_code_says_whether_to_train(data: Path) -> None:
    config = sound(data)
    config.dump(data / "good.py")
    result = run_tool(data / "good.py")
    assert result.returncode == 0 and "0 errors, 0 warnings" in result.stdout
    for fault in ("num_classes", "evaluator of no file"):
        FAULTS[fault][0](config)
    config.dump(data / "bad.py")
    result = run_tool(data / "bad.py")
    assert result.returncode == 1 and "2 errors" in result.stdout
    assert "model.bbox_head.num_classes" in result.stdout and "write num_classes=1 there" in result.stdout
    assert run_tool(data / "none.py").returncode == 2


def runner(config: Config, work_dir: Path) -> Runner:
    config.work_dir = str(work_dir)
    config.experiment_name = f"check-{work_dir.name}-{time.time_ns()}"
    return Runner.from_cfg(config)


class Counter:
    """Iterations that a runner came to."""

    def __init__(self, runner: Runner) -> None:
        self.started = 0
        step = runner.model.train_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.started += 1
            return step(*args, **kwargs)

        runner.model.train_step = counted


@pytest.mark.parametrize("fault", ["num_classes", "metainfo of one loader", "evaluator of another file"])
def test_a_doomed_training_stops_before_its_first_iteration(data: Path, tmp_path: Path, fault: str) -> None:
    """Without the hook the last two end after the first validation: in a real run, hours later."""
    config = sound(data)
    spoil, field, message = FAULTS[fault]
    if fault == "metainfo of one loader":
        (data / "val.json").write_text(json.dumps(coco("oak")))
        config.val_dataloader.dataset.metainfo = {"classes": ("oak",)}
        message = "names 'oak', but train_dataloader.dataset 'tree'"
    else:
        spoil(config)
    doomed = runner(config, tmp_path / "work")
    count = Counter(doomed)
    with pytest.raises(ValueError, match="problem") as caught:
        doomed.train()
    assert count.started == 0
    assert field in str(caught.value) and message in str(caught.value)


def test_control_a_sound_training_runs(data: Path, tmp_path: Path) -> None:
    good = runner(sound(data), tmp_path / "work")
    count = Counter(good)
    good.train()
    assert count.started == 2


def test_both_names_are_one_hook() -> None:
    assert HOOKS.get("castling_det.DatasetCheckHook") is HOOKS.get("castling_det.ClassCountHook") is ClassCountHook


def test_what_the_data_set_has_checked_is_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castling_det.datasets import config_checks

    read: list[str] = []
    monkeypatch.setattr(config_checks, "check_annotation_file", lambda path, **_: read.append(path) or [])
    config = sound(data)
    config.val_dataloader.dataset.type = "CocoDataset"
    config_checks.check_config(config, trust_checked=True)
    assert read == [str(data / "val.json")]
