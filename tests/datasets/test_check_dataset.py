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
from tests.conversion.conftest import _TINY

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": (64, 48), "keep_ratio": True},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "PackDetInputs", "meta_keys": ("img_id", "img_shape", "ori_shape", "scale_factor")},
]


def coco(name: str = "tree") -> dict[str, Any]:
    box = dict(category_id=1, bbox=[4, 4, 30, 28], area=840, iscrowd=0)
    return {
        "images": [dict(id=i, file_name=f"{i}.png", width=64, height=48) for i in (1, 2)],
        "annotations": [dict(box, id=i, image_id=i) for i in (1, 2)],
        "categories": [dict(id=1, name=name)],
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
    dataset = dict(
        type="castling_det.CheckedCocoDataset",
        data_root=str(root),
        ann_file=f"{split}.json",
        data_prefix=dict(img="img/"),
        metainfo=dict(classes=("tree",)),
        test_mode=split == "val",
        pipeline=copy.deepcopy(PIPELINE),
    )
    return dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dataset)


def sound(root: Path) -> Config:
    """A detector that trains in milliseconds."""
    model = copy.deepcopy(_TINY["model"])
    model["bbox_head"]["num_classes"] = 1
    evaluator = {"type": "CocoMetric", "ann_file": str(root / "val.json"), "metric": "bbox"}
    settings = dict(
        default_scope="mmdet",
        model=model,
        train_dataloader=loader(root, "train"),
        val_dataloader=loader(root, "val"),
        test_dataloader=loader(root, "val"),
        val_evaluator=evaluator,
        test_evaluator=dict(evaluator),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=100, save_last=False, by_epoch=False)),
        custom_hooks=[dict(type="castling_det.ClassCountHook")],
        env_cfg=dict(mp_cfg=dict(opencv_num_threads=0)),
    )
    return Config(settings)


def test_a_sound_config_has_no_problem(data: Path) -> None:
    config = sound(data)
    config.model.backbone.num_classes = 1000  # counts something else
    config.model.rpn_head = {"num_classes": 7}
    before = config.to_dict()
    assert castling_det.check_dataset(config, level="pixels") == []
    assert config.to_dict() == before


def _set(**fields: Any) -> Callable[[Config], None]:
    """Double underscores stand for dots."""
    return lambda config: config.merge_from_dict({key.replace("__", "."): value for key, value in fields.items()})


def _train_on(make: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Config], None]:
    """Puts what is made from the validation data, with a file that is missing, in the place of the training data."""
    return lambda c: c.train_dataloader.update(dataset=make({**c.val_dataloader.dataset, "ann_file": "x.json"}))


TRAIN, VAL = "train_dataloader.dataset", "val_dataloader.dataset"
# What is changed in the config; field and message of the one problem.
FAULTS: dict[str, tuple[Callable[[Config], None], str, str]] = {
    "num_classes": (_set(model__bbox_head__num_classes=80), "model.bbox_head.num_classes", "is 80, but train_"),
    "metainfo": (
        lambda c: [c[f"{s}_dataloader"].dataset.metainfo.update(classes=("oak",)) for s in ("train", "val", "test")],
        f"{TRAIN}.metainfo['classes']",
        "1 of its 1 names are no category",
    ),
    "metainfo of one loader": (
        lambda c: c.val_dataloader.dataset.update(metainfo={"classes": ("tree", "oak")}),
        f"{VAL}.metainfo['classes']",
        "but train_dataloader.dataset 'tree'",
    ),
    "no metainfo": (
        lambda c: c.train_dataloader.dataset.pop("metainfo"),
        f"{TRAIN}.metainfo['classes']",
        "80 of its 80 names",
    ),
    "ann_file": (_set(train_dataloader__dataset__ann_file="x.json"), f"{TRAIN}.ann_file", "not a file"),
    "data_prefix": (
        _set(val_dataloader__dataset__data_prefix__img="pictures/"),
        f"{VAL}.data_prefix['img']",
        "2 of 2 image files",
    ),
    "evaluator of another file": (
        lambda c: c.val_evaluator.update(ann_file=c.val_evaluator.ann_file.replace("val", "train")),
        "val_evaluator.ann_file",
        "is another file than val_dataloader reads",
    ),
    "evaluator of no file": (_set(val_evaluator__ann_file="none.json"), "val_evaluator.ann_file", "is not a file"),
    "wrapped": (
        _train_on(lambda missing: {"type": "RepeatDataset", "times": 2, "dataset": missing}),
        f"{TRAIN}.dataset.ann_file",
        "is not a file",
    ),
    "concatenated": (
        _train_on(lambda missing: {"type": "ConcatDataset", "datasets": [missing, missing]}),
        f"{TRAIN}.datasets[0].ann_file",
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


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), *map(str, arguments)]
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


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], tuple[Runner, list[int]]]:
    """A config's runner, and a list with an entry for each iteration that it comes to."""

    def make(config: Config) -> tuple[Runner, list[int]]:
        config.work_dir = str(tmp_path / "work")
        config.experiment_name = f"check-{time.time_ns()}"
        runner, started = Runner.from_cfg(config), []
        step = runner.model.train_step
        monkeypatch.setattr(runner.model, "train_step", lambda *a, **k: started.append(1) or step(*a, **k))
        return runner, started

    return make


@pytest.mark.parametrize("fault", ["num_classes", "metainfo of one loader", "evaluator of another file"])
def test_a_doomed_training_stops_before_its_first_iteration(data: Path, run_of: Any, fault: str) -> None:
    """Without the hook the last two end after the first validation: in a real run, hours later."""
    config = sound(data)
    spoil, field, message = FAULTS[fault]
    if fault == "metainfo of one loader":
        (data / "val.json").write_text(json.dumps(coco("oak")))
        config.val_dataloader.dataset.metainfo = {"classes": ("oak",)}
        message = "names 'oak', but train_dataloader.dataset 'tree'"
    else:
        spoil(config)
    doomed, started = run_of(config)
    with pytest.raises(ValueError, match="problem") as caught:
        doomed.train()
    assert not started
    assert field in str(caught.value) and message in str(caught.value)


def test_control_a_sound_training_runs(data: Path, run_of: Any) -> None:
    good, started = run_of(sound(data))
    good.train()
    assert len(started) == 2
    assert HOOKS.get("castling_det.DatasetCheckHook") is HOOKS.get("castling_det.ClassCountHook") is ClassCountHook


def test_what_the_data_set_has_checked_is_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castling_det.datasets import config_checks

    read: list[str] = []
    monkeypatch.setattr(config_checks, "check_annotation_file", lambda path, **_: read.append(path) or [])
    config = sound(data)
    config.val_dataloader.dataset.type = "CocoDataset"
    config_checks.check_config(config, trust_checked=True)
    assert read == [str(data / "val.json")]
