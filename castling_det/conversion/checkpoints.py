"""Reading checkpoints without running anything that is in them, and finding the weights in them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from castling_det.conversion.safe_pickle import UnsafePickle, read_torch_file

__all__ = ["WEIGHTS", "Weights", "load_checkpoint", "safetensors_bytes", "select_weights"]

_META = "castling_det.meta"
WEIGHTS = ("auto", "ema", "online")

_STATE_DICT_KEYS = ("state_dict", "model", "teacher", "model_state")
_WANTED = f"tensors by name under one of {', '.join(map(repr, _STATE_DICT_KEYS))}, or in the file itself"
# timm and DeiT keep the average under a name of its own; MMEngine's EMAHook saves it as `state_dict`.
_EMA_BESIDE = {"state_dict": "state_dict_ema", "model": "model_ema"}
_MMENGINE_ONLINE = "ema_state_dict"
_STARTS = {b"PK\x03\x04": None, b"\x80": None} | {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<": "an HTML or XML page, such as the error page of a download",
    b"": "another kind of file",
}
"""What a file is by its first bytes; None for a file of `torch.save`."""


@dataclass(frozen=True)
class Weights:
    """The weights that were picked from a checkpoint, by parameter name."""

    tensors: dict[str, Tensor]
    key: str
    """Where they were in the checkpoint; empty when the file is the state dict itself."""
    kind: str
    """`"ema"`, `"online"`, or `"only"` when the checkpoint has no second set."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Entries beside the weights that belong to no parameter, with the reason."""


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.pth` / `.pt` file, or a `.safetensors` file, onto the CPU. Nothing in the file is run.

    Returns:
        The top-level dict as it was saved, or the tensors of a safetensors file by name, under `state_dict` beside
        `meta` where `safetensors_bytes` wrote it. numpy numbers are Python's, numpy arrays are tensors, and mmengine's
        logged curves (in `message_hub`) are None.

    Raises:
        ValueError: not a whole checkpoint; a pickle that asks for other functions than `torch.save` needs; sizes that
            the file's own bytes cannot hold.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path}: no such file; check the path")
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: is a folder; give the .pth, .pt or .safetensors file in it")
    with path.open("rb") as file:
        head = file.read(32)
    if not head:
        raise ValueError(f"checkpoint {path}: is empty (0 bytes); take another one")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
                text = (opened.metadata() or {}).get(_META)
                return tensors if text is None else {"meta": json.loads(text), "state_dict": tensors}
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"checkpoint {path}: no whole safetensors file ({error}); get the file again") from error
    if kind := next(kind for start, kind in _STARTS.items() if head.startswith(start)):
        raise ValueError(f"checkpoint {path}: not a checkpoint but {kind}; expected a .pth, .pt or .safetensors file")
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(checkpoint).__name__}; expected a dict with {_WANTED}")
    return checkpoint


def safetensors_bytes(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with `meta` as JSON in its header, which `load_checkpoint` reads back."""
    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    return save(whole, {_META: json.dumps(meta, default=str)})


def _read(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except UnsafePickle as error:
        raise ValueError(
            f"checkpoint {path}: its pickle asks for {error}, which is more than numbers and could run code; it was "
            "not loaded. If you trust it, read it yourself and save its state dict alone: "
            "torch.save({'state_dict': ...}, FILE)"
        ) from error
    except (Exception, MemoryError) as error:  # unknown bytes fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to where the file says
            raise
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path}: truncated or damaged ({reason}); get the file again") from error


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
    key = next((name for name in _STATE_DICT_KEYS if isinstance(checkpoint.get(name), Mapping)), "")
    swapped = key == "state_dict" and _MMENGINE_ONLINE in checkpoint
    ema_key = key if swapped else _EMA_BESIDE.get(key, "")
    kind = "only" if ema_key not in checkpoint else "online" if weights == "online" else "ema"
    if kind == "only" and weights == "ema":
        raise ValueError(
            f"checkpoint {path}: weights='ema', but it holds one set of weights and no average; train with "
            "an EMAHook, or take weights='auto'"
        )
    if not (swapped and kind == "online"):
        taken = ema_key if kind == "ema" else key
        return Weights(_tensors(checkpoint[taken] if taken else checkpoint, taken, path), taken, kind)
    tensors = _tensors(checkpoint[_MMENGINE_ONLINE], _MMENGINE_ONLINE, path)
    others = [name for name in tensors if not name.startswith("module.")]
    tensors = {name.removeprefix("module."): value for name, value in tensors.items() if name not in others}
    dropped = {f"{_MMENGINE_ONLINE}.{name}": "counts the updates of the average" for name in others}
    return Weights(tensors, _MMENGINE_ONLINE, "online", dropped)


def _tensors(entries: Any, key: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    where = f"checkpoint {path}" + (f", entry {key!r}" if key else "")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{where}: no state dict in it; expected {_WANTED}")
    if foreign := [
        name for name, value in entries.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]:
        some = ", ".join(map(repr, foreign[:5]))
        raise ValueError(f"{where}: no state dict in it, since {some} holds no tensor; expected {_WANTED}")
    return dict(entries)
