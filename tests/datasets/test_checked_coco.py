"""`castling_det.CheckedCocoDataset` in MMDetection: found by name, stops bad data, trains on empty images."""

from __future__ import annotations

import copy
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
from castling_det.datasets.checks import check_num_classes
from tests.conversion.conftest import _TINY

PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "PackDetInputs"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images: with two boxes, without any, and with an ignored part only."""
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 28], "area": 840, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [20, 30, 40, 30], "area": 1200, "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 1, "bbox": [0, 0, 12, 40], "area": 480, "iscrowd": 1},
    ]
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in (1, 2, 3)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "tree"}],
    }
    (tmp_path / "img").mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (64, 64), (40 * i, 90, 20)).save(tmp_path / "img" / f"{i}.png")
    (tmp_path / "train.json").write_text(json.dumps(data))
    return tmp_path


def build(root: Path, **settings: Any) -> Any:
    init_default_scope("mmdet")
    config = {
        "type": "castling_det.CheckedCocoDataset",
        "data_root": str(root),
        "ann_file": "train.json",
        "data_prefix": {"img": "img/"},
        "metainfo": {"classes": ("tree",)},
        "filter_cfg": {"filter_empty_gt": False},
        "pipeline": PIPELINE,
    }
    return DATASETS.build({**config, **settings})


def edit(root: Path, **fields: Any) -> None:
    data = json.loads((root / "train.json").read_text())
    (root / "train.json").write_text(json.dumps({**data, **fields}))


def test_is_a_coco_dataset_found_by_its_name(root: Path) -> None:
    from mmdet.datasets import CocoDataset

    dataset = build(root)
    assert isinstance(dataset, CocoDataset)
    assert len(dataset) == 3
    assert [len(dataset[i]["data_samples"].gt_instances) for i in range(3)] == [2, 0, 0]
    assert len(dataset[2]["data_samples"].ignored_instances) == 1
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_equals_the_host_data_set(root: Path) -> None:
    ours, theirs = build(root), build(root, type="CocoDataset")
    assert [ours.get_data_info(i) for i in range(3)] == [theirs.get_data_info(i) for i in range(3)]
    assert len(build(root, filter_cfg={"filter_empty_gt": True})) == len(
        build(root, type="CocoDataset", filter_cfg={"filter_empty_gt": True})
    )


def test_classes_that_disagree_stop_before_the_host_fails(root: Path) -> None:
    with pytest.raises(ValueError, match=r"metainfo = dict\(classes=\('tree',\)\)"):
        build(root, metainfo={"classes": ("person", "car")})
    with pytest.raises(ValueError, match=r"(?s)train\.json: 1 problem.*80 of its 80 names are no category"):
        build(root, metainfo=None)


def test_control_the_host_alone_fails_obscurely(root: Path) -> None:
    with pytest.raises(ValueError, match="need at least one array to concatenate"):
        build(root, type="CocoDataset", metainfo=None, filter_cfg={"filter_empty_gt": True})


def test_an_empty_annotation_file_is_named(root: Path) -> None:
    (root / "train.json").write_text("")
    with pytest.raises(ValueError, match=r"train\.json is not JSON"):
        build(root)


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


def test_a_misspelled_setting_fails(root: Path) -> None:
    with pytest.raises(TypeError, match="chek_files"):
        build(root, chek_files=False)


def tiny_gfl(num_classes: int = 1, ignore_iof_thr: float = -1) -> Any:
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = copy.deepcopy(_TINY["model"])
    model["bbox_head"]["num_classes"] = num_classes
    model["train_cfg"]["assigner"]["ignore_iof_thr"] = ignore_iof_thr
    return MODELS.build(model)


@pytest.mark.parametrize(("indices", "ignore_iof_thr"), [((0, 1), -1), ((1, 2), 0.5), ((1,), -1), ((0, 1, 2), 0.5)])
def test_images_without_boxes_train_on(root: Path, indices: tuple[int, ...], ignore_iof_thr: float) -> None:
    dataset, model = build(root), tiny_gfl(ignore_iof_thr=ignore_iof_thr)
    batch = model.data_preprocessor(pseudo_collate([dataset[i] for i in indices]), training=True)
    losses = model(**batch, mode="loss")
    total = sum(value for values in losses.values() for value in values)
    assert torch.isfinite(total) and total > 0
    total.backward()
    gradients = [p.grad for p in model.bbox_head.gfl_cls.parameters()]
    assert gradients and all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_ignored_parts_are_background_unless_the_assigner_is_told(root: Path) -> None:
    """With the host's default of `ignore_iof_thr` a cut tree is trained on as background."""
    edit(
        root,
        annotations=[
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 28], "area": 840, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [40, 0, 24, 64], "area": 1536, "iscrowd": 1},
        ],
    )
    dataset = build(root)
    losses = {}
    for ignore_iof_thr in (-1, 0.5):
        model = tiny_gfl(ignore_iof_thr=ignore_iof_thr)
        batch = model.data_preprocessor(pseudo_collate([dataset[0]]), training=True)
        losses[ignore_iof_thr] = float(sum(model(**batch, mode="loss")["loss_cls"]).detach())
    assert losses[0.5] < losses[-1]


def test_num_classes_of_a_real_model(root: Path) -> None:
    dataset = build(root)
    check_num_classes(tiny_gfl(), dataset.metainfo)
    with pytest.raises(ValueError, match=r"model\.bbox_head\.num_classes=80 \(GFLHead\)"):
        check_num_classes(tiny_gfl(num_classes=80), dataset.metainfo)
