"""The detector of a config in any attention mode, and loading a checkpoint into it: exactly, or not at all."""

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

from castling_det.config import load_config
from castling_det.conversion.checkpoints import Weights, select_weights
from castling_det.engine.mask_annealing import META_KEY, attention_record
from castling_det.layers import ATTENTION_MODES, attention_layers

__all__ = ["build_detector", "check_deployable", "load_exactly", "load_weights", "training_config", "with_attention"]

_OF_THE_MASK = ("mode", "threshold", "threshold_unit", "eval_aux")
"""Options that change between training and deployment."""


def training_config(config: str | os.PathLike[str] | Config) -> Config:
    """The config of a castling training or of its deploy twin, from a file or as it is."""
    config = load_config(config)
    if "model" not in config:
        raise ValueError(f"config {config.filename}: has no `model`; give the config of the training")
    modes = attention_modes(config)
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


def attention_modes(config: Config) -> set[str]:
    """The attentions of the parts of a detector's config that have one."""
    return {part.get("attention", "castling") for part in _attention_parts(config.get("model"))}


def with_attention(config: Config, attention: str) -> Config:
    """A copy of `config` whose model has `attention`, no initial weights, no teacher; `"linear"` drops the hook."""
    config = copy.deepcopy(config)
    if config.model.get("type") == "castling_det.DistilledSingleStage":
        config.model["type"] = "SingleStageDetector"
        config.model.pop("distillation", None)
    for part in _attention_parts(config.model):
        part["attention"] = attention
        (part.get("attn_cfg") or {}).pop("eval_aux", None)
        if "init_cfg" in part:
            part["init_cfg"] = None
    if attention == "linear" and "custom_hooks" in config:
        others = [hook for hook in config.custom_hooks if hook.get("type") != "castling_det.MaskAnnealingHook"]
        config["custom_hooks"] = others
    return config


def build_detector(config: Config) -> nn.Module:
    """The detector of `config` in eval mode, with random weights."""
    init_default_scope(config.get("default_scope") or "mmdet")
    try:
        # Some detectors, such as DINO, write into the config that they are built from.
        model: nn.Module = MODELS.build(copy.deepcopy(config.model))
    except Exception as error:  # any part of a detector raises in its own way
        raise ValueError(f"config {config.filename}: its model cannot be built: {error}") from error
    if not hasattr(model, "backbone"):
        raise ValueError(f"config {config.filename}: {type(model).__name__} has no `backbone`; expected a detector")
    return model.eval()


def own_meta(checkpoint: Mapping[str, Any], source: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint's meta, and this package's records in it; each is empty if it is not there."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    own = meta.get(META_KEY) or {}
    parts = [own.get(name) or {} for name in ("mask", "attention", "converted")] if isinstance(own, dict) else [own]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"checkpoint {source}: meta[{META_KEY!r}] is no record of this package; get the file again")
    return meta, own


def trained_attention(meta: Mapping[str, Any]) -> set[str]:
    """The attention modes that the config text in a checkpoint's meta names; it is searched, not run."""
    modes = "|".join(ATTENTION_MODES)
    return set(re.findall(rf"""\battention=['"]({modes})['"]""", str(meta.get("cfg", ""))))


def check_deployable(
    checkpoint: Mapping[str, Any], source: object, attention: str = "linear"
) -> tuple[dict[str, Any], list[str]]:
    """The meta of a checkpoint whose linear attention can be used alone, and notes on what it does not say.

    With `attention="softmax"`, that of a softmax training.
    """
    meta, own = own_meta(checkpoint, source)
    modes = trained_attention(meta) | ({"castling"} if own.get("mask") else set())
    if own.get("converted"):
        modes = {"linear"}
    if modes == {attention}:
        return meta, []
    if modes:
        fix = {
            "linear": "and is not converted; run tools/convert.py on it and take the file that it writes",
            "softmax": "but the config has attention='softmax'; give the config that it was trained with",
        }
        trained = ", ".join(sorted(modes))
        raise ValueError(f"checkpoint {source}: was trained with attention={trained!r} {fix[attention]}")
    note = {
        "linear": "weights of a castling training whose mask is not empty would compute something else here; "
        "tools/convert.py checks that",
        "softmax": "weights of another attention would compute something else here",
    }
    return meta, [f"the checkpoint does not say how it was trained: {note[attention]}"]


def load_weights(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str | os.PathLike[str], weights: str = "auto"
) -> tuple[Weights, list[str]]:
    """Loads a checkpoint into the detector of a config, and compares the options of the attention, which no parameter
    shows, with those that the checkpoint records.

    Returns:
        The weights that were loaded, and notes on what could not be checked.
    """
    picked = select_weights(checkpoint, source, weights)
    load_exactly(model, picked.tensors, source)
    recorded = own_meta(checkpoint, source)[1].get("attention") or {}
    layers = attention_record(attention_layers(model))
    if layers and not recorded:
        return picked, ["the checkpoint does not state the options of its attention: those of the config were taken"]
    for name, options in layers.items():
        trained = recorded.get(name)
        if not isinstance(trained, Mapping):
            raise ValueError(f"checkpoint {source}: states no options for the attention {name}; give its own config")
        softmax = "softmax" in (trained.get("mode"), options["mode"])
        free = (*_OF_THE_MASK, *(("normalizer", "center_keys") if softmax else ()))
        for field, value in options.items():
            if field not in free and trained.get(field, value) != value:
                place = "model.backbone" if field == "num_heads" else "model.backbone.attn_cfg"
                raise ValueError(
                    f"checkpoint {source}: its attention {name} was trained with {field}={trained[field]!r}, but the "
                    f"config has {field}={value!r}; set {place}.{field} to the trained value"
                )
    return picked, []


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Loads `tensors` so that every entry finds its place and every place an entry."""
    target = model.state_dict()
    faults = {
        "missing": [name for name in target if name not in tensors],
        "unexpected": [name for name in tensors if name not in target],
        "of another shape": other_shapes(tensors, target),
    }
    shown = {what: ", ".join(names[:5]) + ", ..." * (len(names) > 5) for what, names in faults.items()}
    if named := [f"{len(names)} {what}: {shown[what]}" for what, names in faults.items() if names]:
        raise ValueError(
            f"checkpoint {source}: another architecture than the config's ({'; '.join(named)}); give the "
            "config that it was trained with"
        )
    check_numbers(tensors, target, source)
    with torch.no_grad():
        model.load_state_dict(dict(tensors), strict=True)


def other_shapes(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """The tensors whose shape is not that of the target's tensor of the same name, with both shapes."""
    both = {name: (tuple(tensors[name].shape), tuple(target[name].shape)) for name in tensors if name in target}
    return [f"{name} {one} for {own}" for name, (one, own) in both.items() if one != own]


def check_numbers(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Refuses numbers that the model's tensors of the same name cannot take. float16 for float32 is fine."""
    dtypes = {name: (value.dtype, target[name].dtype) for name, value in tensors.items()}
    if kinds := [f"{name} {one} for {own}" for name, (one, own) in dtypes.items() if _kind(one) != _kind(own)]:
        raise ValueError(
            f"checkpoint {source}: {len(kinds)} tensors hold another kind of number than the model's, such as "
            f"{'; '.join(kinds[:3])}; give floating-point weights"
        )
    floats = {name: value.to(dtypes[name][1]) for name, value in tensors.items() if value.is_floating_point()}
    if broken := [name for name, value in floats.items() if not value.isfinite().all()]:
        raise ValueError(
            f"checkpoint {source}: values that are not finite in {len(broken)} tensors, such as {broken[0]}; "
            "the training diverged, take an earlier checkpoint"
        )


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _attention_parts(part: Any) -> Iterator[Any]:
    """Every dict in a model config that builds something with an `attention` option."""
    if isinstance(part, dict):
        kind = str(part.get("type"))
        built = MODELS.get(kind) if kind.startswith("castling_det.") else None
        takes = built is not None and "attention" in inspect.signature(built).parameters
        if takes or part.get("attention") in ATTENTION_MODES:
            yield part
    if isinstance(part, (dict, list, tuple)):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _attention_parts(value)
