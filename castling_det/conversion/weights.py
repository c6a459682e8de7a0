"""Finding the weights in a checkpoint: Runner, timm, DeiT, DINO, with or without an averaged copy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["STATE_DICT_KEYS", "WEIGHTS", "Weights", "select_weights"]

WEIGHTS = ("auto", "ema", "online")
STATE_DICT_KEYS = ("state_dict", "model", "teacher", "model_state")

# An averaged beside a trained copy: mmengine's EMAHook swaps the two when it saves, so that `state_dict` is
# the average; timm and DeiT keep the average under a name of its own.
_EMA_BESIDE = {"state_dict": "state_dict_ema", "model": "model_ema"}
_MMENGINE_ONLINE = "ema_state_dict"
_WANTED = f"expected tensors by name under one of {', '.join(map(repr, STATE_DICT_KEYS))}, or in the file itself"


@dataclass(frozen=True)
class Weights:
    """The weights that were picked from a checkpoint."""

    tensors: dict[str, Tensor]
    """By parameter name, as the model names them."""
    key: str
    """Where they lay in the checkpoint; empty when the file is the state dict itself."""
    kind: str
    """`"ema"`, `"online"`, or `"only"` when the checkpoint has no second set."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Entries beside the weights that belong to no parameter, with the reason."""


def select_weights(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], weights: str = "auto") -> Weights:
    """Finds the state dict of a Runner, timm, DeiT or DINO checkpoint, or a plain state dict.

    Args:
        checkpoint: what `load_checkpoint` gave.
        path: its file, for messages.
        weights: `"ema"` averaged, `"online"` as the optimizer left them, `"auto"` the average if it is there.

    Raises:
        ValueError: no state dict, or not the weights that were asked for.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(map(repr, WEIGHTS))}")
    key = next((name for name in STATE_DICT_KEYS if isinstance(checkpoint.get(name), Mapping)), "")
    if key == "state_dict" and _MMENGINE_ONLINE in checkpoint:
        if weights != "online":
            return Weights(_tensors(checkpoint[key], key, path), key, "ema")
        return _mmengine_online(checkpoint, path)
    ema_key = _EMA_BESIDE.get(key, "")
    if ema_key in checkpoint:
        key = key if weights == "online" else ema_key
        return Weights(_tensors(checkpoint[key], key, path), key, "online" if weights == "online" else "ema")
    if weights == "ema":
        raise ValueError(
            f"checkpoint {path}: weights='ema', but it holds one set of weights and no average; train with "
            "an EMAHook, or take weights='auto'"
        )
    return Weights(_tensors(checkpoint[key] if key else checkpoint, key, path), key, "only")


def _mmengine_online(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> Weights:
    prefix = "module."
    entries = _tensors(checkpoint[_MMENGINE_ONLINE], _MMENGINE_ONLINE, path)
    tensors = {name[len(prefix) :]: value for name, value in entries.items() if name.startswith(prefix)}
    dropped = {
        f"{_MMENGINE_ONLINE}.{name}": "counts the updates of the average"
        for name in entries
        if not name.startswith(prefix)
    }
    return Weights(tensors, _MMENGINE_ONLINE, "online", dropped)


def _tensors(entries: Any, key: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    where = f"checkpoint {path}" + (f", entry {key!r}" if key else "")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{where}: no state dict in it; {_WANTED}")
    foreign = [name for name, value in entries.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if foreign:
        some = ", ".join(f"{name!r}" for name in foreign[:5])
        raise ValueError(f"{where}: no state dict in it, since {some} holds no tensor; {_WANTED}")
    return dict(entries)
