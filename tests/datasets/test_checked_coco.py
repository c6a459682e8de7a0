"""`castling_det.CheckedCocoDataset` in MMDetection: found by name, stops bad data, trains on empty images."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from PIL import Image

from castling_det.datasets import coco
from tests.datasets.test_check_dataset import loader, sound

PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "PackDetInputs"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images: with two boxes, without any, and with an ignored part only."""
    boxes = ((1, [4, 4, 30, 28], 0), (1, [20, 30, 40, 30], 0), (3, [0, 0, 12, 40], 1))
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in (1, 2, 3)],
        "annotations": [
            dict(id=number, image_id=image, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=crowd)
            for number, (image, box, crowd) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "tree"}],
    }
    (tmp_path / "img").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (64, 64), (40 * i, 90, 20)).save(tmp_path / "img" / f"{i}.png")
    (tmp_path / "train.json").write_text(json.dumps(data))
    return tmp_path


def build(root: Path, **settings: Any) -> Any:
    init_default_scope("mmdet")
    dataset = loader(root, "train")["dataset"] | dict(filter_cfg=dict(filter_empty_gt=False), pipeline=PIPELINE)
    return DATASETS.build(dataset | settings)


def edit(root: Path, **fields: Any) -> None:
    data = json.loads((root / "train.json").read_text())
    (root / "train.json").write_text(json.dumps({**data, **fields}))


def test_equals_the_host_data_set(root: Path) -> None:
    ours, theirs = build(root), build(root, type="CocoDataset")
    assert [ours.get_data_info(i) for i in range(3)] == [theirs.get_data_info(i) for i in range(3)]
    assert len(pickle.loads(pickle.dumps(ours))) == 3


def test_classes_that_disagree_stop_before_the_host_fails(root: Path) -> None:
    with pytest.raises(ValueError, match=r"metainfo = dict\(classes=\('tree',\)\)"):
        build(root, metainfo={"classes": ("person", "car")})
    with pytest.raises(ValueError, match=r"(?s)train\.json: 1 problem.*80 of its 80 names are no category"):
        build(root, metainfo=None)


def test_no_annotations_stop_training_but_not_testing(root: Path) -> None:
    edit(root, annotations=[])
    with pytest.raises(ValueError, match="annotations: is empty"):
        build(root)
    assert len(build(root, test_mode=True)) == 3


def test_missing_files_are_named_unless_the_check_is_off(root: Path) -> None:
    (root / "img" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 image files are not under .*'2\.png'"):
        build(root)
    assert len(build(root, check_files=False)) == 3
    assert len(build(root, backend_args={"backend": "local"})) == 3


def test_warnings_are_logged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, int]] = []
    monkeypatch.setattr(coco, "print_log", lambda text, logger, level: logged.append((text, level)))
    edit(root, categories=[{"id": 1, "name": "tree"}, {"id": 2, "name": "shrub"}])
    assert len(build(root)) == 3
    ((text, level),) = logged
    assert "leaves out the file's categories 'shrub'" in text and level == logging.WARNING


@pytest.mark.parametrize(("indices", "ignore_iof_thr"), [((1,), -1), ((0, 1, 2), 0.5)])
def test_images_without_boxes_train_on(root: Path, indices: tuple[int, ...], ignore_iof_thr: float) -> None:
    torch.manual_seed(0)
    dataset, config = build(root), sound(root).model
    config.train_cfg.assigner.ignore_iof_thr = ignore_iof_thr
    model = MODELS.build(config)
    batch = model.data_preprocessor(pseudo_collate([dataset[i] for i in indices]), training=True)
    losses = model(**batch, mode="loss")
    total = sum(value for values in losses.values() for value in values)
    assert torch.isfinite(total) and total > 0
    total.backward()
    gradients = [p.grad for p in model.bbox_head.gfl_cls.parameters()]
    assert gradients and all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
