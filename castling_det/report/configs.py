"""What a config says: loading it, and the few fields that a report quotes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["attention_of", "checkpoint_of", "load_config", "network_shape", "seed_of"]


def load_config(name: str | os.PathLike[str], options: dict[str, Any] | None = None) -> Any:
    """The mmengine `Config` of a file, or of a package's own config (`mmdet::gfl/gfl_r50_fpn_1x_coco.py`).

    Args:
        name: path, or `package::path`.
        options: dotted keys and the values to set, as `--cfg-options` of MMDetection's tools.

    Raises:
        ValueError: no such file, or it cannot be read as a config; names it.
    """
    from mmengine.config import Config
    from mmengine.hub import get_config

    text = str(name)
    if "::" not in text and not Path(text).is_file():
        raise ValueError(
            f"config {text}: no such file; give a .py config or a name such as mmdet::gfl/gfl_r50_fpn_1x_coco.py"
        )
    try:
        config = get_config(text) if "::" in text else Config.fromfile(text)
    except Exception as error:  # A config is a program: it can fail in any way.
        raise ValueError(f"config {text}: cannot be read: {type(error).__name__}: {error}") from error
    if options:
        config.merge_from_dict(options)
    return config


def attention_of(config: Any) -> str | None:
    """`model.backbone.attention` as the config says it, or None for a backbone that has no such field."""
    backbone = config.get("model", {}).get("backbone", {})
    attention = backbone.get("attention")
    return str(attention) if attention is not None else None


def seed_of(config: Any) -> int | None:
    """`randomness.seed`, or None if the config leaves it open."""
    seed = (config.get("randomness") or {}).get("seed")
    return int(seed) if seed is not None else None


def checkpoint_of(config: Any) -> str | None:
    """`load_from`: in the config that a test run leaves behind, the checkpoint that was tested."""
    checkpoint = config.get("load_from")
    return str(checkpoint) if checkpoint else None


def network_shape(config: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Height and width that the config's test pipeline brings an image of `image` (height, width) pixels to."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    for transform in dataset.get("pipeline") or []:
        scale = transform.get("scale")
        if not str(transform.get("type", "")).endswith("Resize") or not isinstance(scale, (tuple, list)):
            continue
        width, height = scale
        if not transform.get("keep_ratio"):
            return int(height), int(width)
        # mmcv's rule: the longer side within the longer of the scale, the shorter within the shorter.
        factor = min(max(scale) / max(image), min(scale) / min(image))
        return int(image[0] * factor + 0.5), int(image[1] * factor + 0.5)
    return image
