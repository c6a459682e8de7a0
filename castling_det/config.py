"""Loading a config, and reading fields of it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

__all__ = ["attention_of", "checkpoint_of", "input_size_of", "load_config", "network_shape", "pipeline_of", "seed_of"]


def load_config(config: Any, options: dict[str, Any] | None = None) -> Any:
    """The mmengine `Config` of a file, or of a package's own config (`mmdet::gfl/gfl_r50_fpn_1x_coco.py`).

    Args:
        config: path or `package::path`; a `Config` is returned as it is, or as a copy where there are `options`.
        options: dotted keys and the values to set, as `--cfg-options` of MMDetection's tools.

    Raises:
        ValueError: no such file, or it cannot be read as a config; names it.
    """
    loaded = _read(str(config)) if isinstance(config, (str, os.PathLike)) else config
    if options:
        loaded = copy.deepcopy(loaded)
        loaded.merge_from_dict(options)
    return loaded


def _read(name: str) -> Any:
    from mmengine.config import Config
    from mmengine.hub import get_config

    if "::" not in name and not Path(name).is_file():
        raise ValueError(f"config {name}: no such file; give a .py config, or a name such as mmdet::gfl/NAME.py")
    try:
        return get_config(name) if "::" in name else Config.fromfile(name)
    except Exception as error:  # A config is a program: it can fail in any way.
        raise ValueError(f"config {name}: cannot be read: {type(error).__name__}: {error}") from error


def attention_of(config: Any) -> str | None:
    """`model.backbone.attention`, or None for a backbone that has no such field."""
    attention = ((config.get("model") or {}).get("backbone") or {}).get("attention")
    return None if attention is None else str(attention)


def seed_of(config: Any) -> int | None:
    """`randomness.seed`, or None if the config leaves it open."""
    seed = (config.get("randomness") or {}).get("seed")
    return None if seed is None else int(seed)


def checkpoint_of(config: Any) -> str | None:
    """`load_from`: in the config that a test run leaves behind, the checkpoint that was tested."""
    checkpoint = config.get("load_from")
    return str(checkpoint) if checkpoint else None


def pipeline_of(config: Any) -> list[dict[str, Any]]:
    """The steps that prepare a test image, copied, also of a wrapped data set; empty if the config has none."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset:
        inner = dataset.get("dataset") or (dataset.get("datasets") or [None])[0]
        if inner is None:
            return []
        dataset = inner
    return [copy.deepcopy(step) for step in dataset["pipeline"] or []]


def input_size_of(config: Any) -> tuple[int, int] | None:
    """Height and width in the `scale` of the test pipeline's resize, or None if it states none."""
    step = _resize(config)
    return None if step is None else (int(step["scale"][1]), int(step["scale"][0]))


def network_shape(config: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Height and width that the test pipeline brings an image of `image` (height, width) pixels to."""
    step = _resize(config)
    if step is None:
        return image
    scale = step["scale"]
    if not step.get("keep_ratio"):
        return int(scale[1]), int(scale[0])
    # mmcv's rule: the longer side within the longer of the scale, the shorter within the shorter.
    factor = min(max(scale) / max(image), min(scale) / min(image))
    return int(image[0] * factor + 0.5), int(image[1] * factor + 0.5)


def _resize(config: Any) -> dict[str, Any] | None:
    """The first step of the test pipeline that resizes to a stated (width, height)."""
    for step in pipeline_of(config):
        scale = step.get("scale")
        if str(step.get("type", "")).endswith("Resize") and isinstance(scale, (tuple, list)) and len(scale) == 2:
            return step
    return None
