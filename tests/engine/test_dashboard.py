"""A short training on the tree crowns with the dashboard, and what TensorBoard's own reader finds in its event file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from castling_det.engine import DashboardHook, hooks

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data" / "tree_crowns"
CONFIG = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
MAX_ITERS = 4

needs_data = pytest.mark.skipif(not (DATA / "prepared.json").is_file(), reason="run make data")


def _short_config(work_dir: Path, **hook: object) -> Config:
    """The tree-crown recipe: four iterations, two validations of three images; the hook as the command line adds it."""
    document = json.loads((DATA / "annotations" / "val.json").read_text())
    document["images"] = document["images"][:3]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [row for row in document["annotations"] if row["image_id"] in kept]
    work_dir.mkdir(parents=True)
    few = work_dir / "few.json"
    few.write_text(json.dumps(document))
    config = Config.fromfile(CONFIG)
    options = {
        "default_hooks.dashboard.type": "castling_det.DashboardHook",
        "train_cfg.max_iters": MAX_ITERS,
        "train_cfg.val_interval": 2,
        "default_hooks.logger.interval": 2,
        "default_hooks.checkpoint.interval": MAX_ITERS,
        "custom_hooks.2.interval": 1,
        "train_dataloader.batch_size": 1,
        "randomness.seed": 0,
        "val_evaluator.ann_file": str(few),
        "val_dataloader.dataset.ann_file": str(few),
        **{f"default_hooks.dashboard.{key}": value for key, value in hook.items()},
    }
    for loader in ("train_dataloader", "val_dataloader"):
        options |= {f"{loader}.num_workers": 0, f"{loader}.persistent_workers": False}
        options[f"{loader}.dataset.data_root"] = f"{DATA}/"
    config.merge_from_dict(options)
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    config.work_dir = str(work_dir / "run")
    # mmengine keeps one visualizer of a name in a process.
    config.visualizer.name = f"dashboard_{work_dir.name}"
    config.experiment_name = f"dashboard_{work_dir.name}"
    return config


def _train(config: Config) -> Path:
    """Returns the folder of the logs."""
    init_default_scope("mmdet")
    # A low score, so that a detector that has learnt nothing has boxes to draw.
    config.model.test_cfg.score_thr = 0.0
    runner = Runner.from_cfg(config)
    runner.train()
    return Path(runner.log_dir) / "vis_data"


@needs_data
def test_tensorboard_has_the_masks_and_the_validation_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = _train(_short_config(tmp_path / "tensorboard", pictures=2, score=0.0))
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["val_0", "val_1"]
    pictures = {tag: events.Images(tag) for tag in tags["images"]}
    assert [event.step for event in pictures["val_0"]] == [2, 4], "the same image over training"
    assert pictures["val_0"][0].width == 2 * 256 and pictures["val_0"][0].height == 256, "ground truth and prediction"
    drawn = [np.asarray(Image.open(folder / "vis_image" / f"val_{i}_4.png").convert("RGB")) for i in (0, 1)]
    assert (drawn[0] != drawn[1]).any()
    left, right = drawn[0][:, :256], drawn[0][:, 256:]
    assert (left != right).any()
    for layer in range(4):
        scalars = events.Scalars(f"mask/kept_fraction/blocks.{layer}")
        assert [event.step for event in scalars] == [1, 2, 3, 4]
        assert all(0 <= event.value <= 1 for event in scalars)
    assert events.Scalars("mask/threshold")[-1].value == pytest.approx(576), "empty at the end"
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert [event.step for event in events.Scalars("coco/bbox_mAP")] == [2, 4]
    assert "config/text_summary" in tags["tensors"]
    assert (folder / "scalars.json").is_file(), "what the report reads is still there"


@needs_data
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = _train(_short_config(tmp_path / "wandb", backend="wandb", pictures=1, init_kwargs=dict(mode="offline")))
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    assert all(key in written for key in (b"mask/threshold", b"mask/kept_mass/blocks.0", b"coco/bbox_mAP", b"val_0"))
    assert len(list(log.parent.glob("files/media/images/val_0*.png"))) == 2, "one a validation"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "visdom"}, "backend='visdom': expected one of 'tensorboard', 'wandb'"),
        ({"pictures": -1}, "pictures=-1"),
        ({"score": 2}, "score=2"),
        ({"init_kwargs": {}}, "backend='tensorboard' takes none"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DashboardHook(**options)  # type: ignore[arg-type]


def test_a_missing_package_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="wandb is not installed; pip install wandb"):
        DashboardHook(backend="wandb")
