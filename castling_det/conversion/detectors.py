"""The hybrid detector of a config, its linear twin, and strict loading into either."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from castling_det.conversion.limits import not_finite, other_kinds
from castling_det.layers import ATTENTION_MODES

__all__ = ["build_detector", "load_config", "load_exactly", "trained_attention", "with_attention"]

_PACKAGE = "castling_det."
_HOOK = f"{_PACKAGE}MaskAnnealingHook"
_DISTILLED = f"{_PACKAGE}DistilledSingleStage"


def load_config(config: str | os.PathLike[str] | Config) -> Config:
    """The config of the training, from a file or as it is.

    Raises:
        ValueError: no such file, no `model`, or no backbone with castling or linear attention in it.
    """
    if not isinstance(config, Config):
        if not os.path.isfile(config):
            raise ValueError(f"config {os.fspath(config)}: no such file; give the config of the training")
        config = _read_config(config)
    if "model" not in config:
        raise ValueError(f"config {config.filename}: has no `model`; give the config of the training")
    modes = {part.get("attention", "castling") for part in _attention_parts(config.model)}
    if not modes:
        raise ValueError(
            f"config {config.filename}: no part of `model` takes `attention`; expected a backbone of this "
            "package, such as dict(type='castling_det.CastlingViT', attention='castling')"
        )
    if not modes <= {"castling", "linear"}:
        raise ValueError(
            f"config {config.filename}: model.backbone.attention='softmax': only a detector that was "
            "trained with attention='castling' can be converted; give its config"
        )
    return config


def _read_config(path: str | os.PathLike[str]) -> Config:
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program: it fails in any way
        raise ValueError(f"config {os.fspath(path)}: cannot be read: {error}") from error


def with_attention(config: Config, attention: str) -> Config:
    """A copy of `config` whose model has `attention`, no initial weights, no teacher; `"linear"` drops the hook."""
    config = copy.deepcopy(config)
    if config.model.get("type") == _DISTILLED:
        config.model["type"] = "SingleStageDetector"
        config.model.pop("distillation", None)
    for part in _attention_parts(config.model):
        part["attention"] = attention
        (part.get("attn_cfg") or {}).pop("eval_aux", None)
        if "init_cfg" in part:
            part["init_cfg"] = None
    if attention == "linear" and "custom_hooks" in config:
        config["custom_hooks"] = [hook for hook in config.custom_hooks if hook.get("type") != _HOOK]
    return config


def build_detector(config: Config) -> nn.Module:
    """The detector of `config` in eval mode, its weights not initialised from anywhere."""
    init_default_scope(config.get("default_scope") or "mmdet")
    try:
        # Some detectors, such as DINO, write into the config that they are built from.
        model: nn.Module = MODELS.build(copy.deepcopy(config.model))
    except Exception as error:  # any part of a detector raises in its own way
        raise ValueError(f"config {config.filename}: its model cannot be built: {error}") from error
    if not hasattr(model, "backbone"):
        raise ValueError(f"config {config.filename}: {type(model).__name__} has no `backbone`; expected a detector")
    return model.eval()


def trained_attention(meta: Mapping[str, Any]) -> set[str]:
    """The attention modes that the config text in a checkpoint's meta names; it is searched, not run."""
    modes = "|".join(ATTENTION_MODES)
    return set(re.findall(rf"""\battention=['"]({modes})['"]""", str(meta.get("cfg", ""))))


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Loads `tensors` so that every entry finds its place and every place an entry.

    Raises:
        ValueError: missing or unexpected names, other shapes or kinds of number, values that are not finite; each is
            named.
    """
    target = model.state_dict()
    missing = [name for name in target if name not in tensors]
    unexpected = [name for name in tensors if name not in target]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in target.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind of number", other_kinds(tensors, target)),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"checkpoint {source}: another architecture than the config's ({'; '.join(faults)}); give the "
            "config that it was trained with"
        )
    if broken := not_finite(tensors, target):
        raise ValueError(
            f"checkpoint {source}: values that are not finite in {len(broken)} tensors, such as {broken[0]}; "
            "the training diverged, take an earlier checkpoint"
        )
    with torch.no_grad():
        model.load_state_dict(dict(tensors), strict=True)


def _attention_parts(part: Any) -> Iterator[Any]:
    """Every dict in a model config that builds something with an `attention` option."""
    if isinstance(part, dict):
        if part.get("attention") in ATTENTION_MODES or _takes_attention(part.get("type")):
            yield part
        for value in part.values():
            yield from _attention_parts(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _attention_parts(value)


def _takes_attention(kind: object) -> bool:
    if not isinstance(kind, str) or not kind.startswith(_PACKAGE):
        return False
    built = MODELS.get(kind)
    return built is not None and "attention" in inspect.signature(built).parameters
