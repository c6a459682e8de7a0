"""The smallest detector and data on which distributed training can be compared with one process.

Equal in theory, up to the order of additions: no BatchNorm (its statistics are of a rank's own batch), no dropout, and
losses whose normalisers are reduced over the ranks. GFL's are, but its box losses divide by at least 1, so the scores
at the positive locations must sum to more than that on every rank. The pipeline draws nothing at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.packaging.test_installed import write_coco

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
ITERATIONS = 6
GLOBAL_BATCH = 4
ON_CPU = {
    "env_cfg.dist_cfg": dict(backend="gloo", timeout=60),
    "model_wrapper_cfg": dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False),
    "sync_bn": None,
}
"""What makes one of our configs train on CPU ranks; docs/distributed.md has it as --cfg-options."""


def options(
    folder: Path, *, ranks: int, attention: str = "castling", with_cp: bool = False, seed: int = 1
) -> dict[str, Any]:
    """What is set otherwise than in the demo's config: one block of width 32 on 64-pixel images, six iterations."""
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="Resize", scale=(64, 64), keep_ratio=True),
        dict(type="PackDetInputs"),
    ]
    loader = dict(batch_size=GLOBAL_BATCH // ranks, num_workers=0, persistent_workers=False)
    backbone = dict(embed_dims=32, depth=2, stem="patch", img_size=64, drop_path_rate=0.0)
    chosen = {
        **{f"model.backbone.{key}": value for key, value in backbone.items()},
        "model.backbone.attention": attention,
        "model.backbone.with_cp": with_cp,
        "model.neck.in_channels": 32,
        "model.neck.out_channels": 32,
        "model.bbox_head.in_channels": 32,
        "model.bbox_head.feat_channels": 32,
        "model.bbox_head.stacked_convs": 1,
        # Scores of a half: their sum is above 1.
        "model.bbox_head.init_cfg": dict(
            type="Normal",
            layer="Conv2d",
            std=0.01,
            override=dict(type="Normal", name="gfl_cls", std=0.01, bias_prob=0.5),
        ),
        **{f"train_dataloader.{key}": value for key, value in loader.items()},
        "train_dataloader.dataset.data_root": f"{folder}/",
        "train_dataloader.dataset.pipeline": pipeline,
        "val_dataloader": None,
        "val_cfg": None,
        "val_evaluator": None,
        "test_dataloader": None,
        "test_cfg": None,
        "test_evaluator": None,
        "train_cfg": dict(_delete_=True, type="IterBasedTrainLoop", max_iters=ITERATIONS, val_interval=1000),
        "default_hooks.checkpoint.interval": 3,
        "default_hooks.checkpoint.max_keep_ckpts": 5,
        "default_hooks.logger.interval": 1,
        # SGD, because AdamW divides a gradient by its size, and so makes noise of one that should be zero; at its full
        # learning rate from the start, for six iterations are to move the weights.
        "optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.004, momentum=0.9, weight_decay=0.05),
        "param_scheduler": [],
        "randomness.seed": seed,
        **ON_CPU,
    }
    hook = dict(type="castling_det.MaskAnnealingHook", schedule="geometric", end=64, empty_from=0.7, interval=1)
    chosen["custom_hooks"] = [hook] if attention == "castling" else []
    return chosen


def write_data(folder: Path) -> Path:
    """Eight images of 256 x 256 pixels with four squares each."""
    write_coco(folder, images=8)
    return folder
