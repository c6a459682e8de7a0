"""The configs of docs/own_data.md load, and the tables are what the records say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

import castling_det

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8"), re.DOTALL)


def load(tmp_path, text):
    assert castling_det.__version__  # the import is what makes `castling_det::` known
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return Config.fromfile(path)


def test_config_for_own_data(tmp_path):
    (block,) = [block for block in BLOCKS if "data/mine/" in block]
    config = load(tmp_path, block)
    assert config.model.bbox_head.num_classes == 2 == len(config.test_dataloader.dataset.metainfo.classes)
    for loader, ann_file in ((config.train_dataloader, "train.json"), (config.val_dataloader, "val.json")):
        assert loader.dataset.type == "castling_det.CheckedCocoDataset"
        assert (loader.dataset.data_root, loader.dataset.ann_file) == ("data/mine/", ann_file)
    assert config.val_dataloader.dataset.test_mode and config.test_evaluator.ann_file == "data/mine/val.json"


def test_backbone_for_another_detector(tmp_path):
    from mmdet.registry import MODELS

    (block,) = [block for block in BLOCKS if "castling_det.Pretrained" in block]
    config = load(tmp_path, block)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    strides = tuple(stride for stride, _ in model.bbox_head.prior_generator.strides)
    assert type(model.backbone).__name__ == "CastlingViT" and len(model.neck.out_strides) == len(strides)
    assert model.neck.out_strides == strides


def test_the_tables_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "dev" / "tables.py"), run_name="__main__")
    assert stop.value.code == 0, "run python tools/dev/tables.py"
