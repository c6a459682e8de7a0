"""The bytes of a converted checkpoint, and the records of what went into it."""

from __future__ import annotations

import importlib.metadata
import io
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from castling_det import __version__
from castling_det.compat.host import HOST_PACKAGES, installed_distributions
from castling_det.conversion.manifest import WeightsRecord
from castling_det.conversion.weights import Weights

__all__ = ["META_KEY", "meta_of", "serialised", "versions", "weights_record"]

META_KEY = "castling_det"

_TRAINING_ONLY = {
    "optimizer": "state of the optimizer",
    "param_schedulers": "state of the learning-rate schedules",
    "message_hub": "logged curves",
    "state_dict": "the weights that were not taken",
    "ema_state_dict": "the weights that were not taken",
}


def meta_of(checkpoint: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The checkpoint's meta, empty if it has none.

    Raises:
        ValueError: it says that the checkpoint is converted already.
    """
    meta = checkpoint.get("meta")
    if not isinstance(meta, dict):
        return {}
    own = meta.get(META_KEY) or {}
    if not isinstance(own, Mapping) or not isinstance(own.get("mask", {}), Mapping | None):
        raise ValueError(f"checkpoint {source}: meta[{META_KEY!r}] is no record of this package; get the file again")
    if converted := own.get("converted"):
        origin = converted.get("source_sha256") if isinstance(converted, Mapping) else "unknown"
        raise ValueError(
            f"checkpoint {source}: is converted already, from the source with sha256 {origin}; use it as it is"
        )
    return meta


def serialised(
    model: nn.Module, config: Config, meta: Mapping[str, Any], record: Mapping[str, Any], *, key: str = "converted"
) -> bytes:
    """The checkpoint file: weights and meta alone, plain enough for `torch.load(..., weights_only=True)`.

    `meta["cfg"]` becomes `config`, which MMDetection's tools read back; the training's stays in
    `meta["castling_det"]["training_cfg"]`, and `record` of what was done in `meta["castling_det"][key]`.
    """
    kept = _plain(dict(meta))
    own = dict(kept.get(META_KEY) or {})
    if "cfg" in kept:
        own["training_cfg"] = kept["cfg"]
    kept["cfg"] = config.pretty_text
    kept[META_KEY] = {**own, key: dict(record)}
    buffer = io.BytesIO()
    torch.save({"meta": kept, "state_dict": model.state_dict()}, buffer)
    return buffer.getvalue()


def weights_record(checkpoint: Mapping[str, Any], picked: Weights, linear: nn.Module) -> WeightsRecord:
    """Every top-level entry of the source that is not in the output, with its reason."""
    dropped = {
        str(name): _TRAINING_ONLY.get(str(name), "not needed to run the detector")
        for name in checkpoint
        if picked.key and name not in ("meta", picked.key)
    }
    return WeightsRecord(
        kind=picked.kind,
        key=picked.key,
        tensors=len(picked.tensors),
        parameters=sum(parameter.numel() for parameter in linear.parameters()),
        dropped={**dropped, **picked.dropped},
    )


def versions() -> dict[str, str]:
    """Of Python, this package and what it runs on."""
    found = {"python": platform.python_version(), "castling_det": __version__}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    for package in HOST_PACKAGES:
        for distribution, version in installed_distributions(package):
            found[package.module] = f"{distribution} {version}"
    return found


def _plain(value: Any) -> Any:
    """numpy numbers and arrays as Python's, so that reading the file needs no allow-list."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value
