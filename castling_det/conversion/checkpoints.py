"""Reading checkpoints without running anything that is in them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from castling_det.conversion.limits import check_archive, check_content
from castling_det.conversion.numpy_pickles import NUMPY_GLOBALS
from castling_det.conversion.weights import STATE_DICT_KEYS

__all__ = ["load_checkpoint"]

_AGAIN = "copy or download it again"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_FOREIGN_MAGICS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<": "an HTML or XML page, such as the error page of a download",
}


class _ScalarHistory:
    """Stands for mmengine's HistoryBuffer while a checkpoint is read: neither curves nor code are needed."""

    def __setstate__(self, state: object) -> None:
        del state


def _statistic_name(owner: object, name: str) -> str:
    # A HistoryBuffer is pickled with `getattr(HistoryBuffer, "mean")`; the real getattr would hand out
    # `__globals__` as well.
    if owner is not _ScalarHistory:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr on something that is not a HistoryBuffer")
    return name


def _allowed_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """All that an mmengine Runner checkpoint holds beyond what torch allows by itself."""
    return [
        (_ScalarHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_statistic_name, "builtins.getattr"),
        *NUMPY_GLOBALS,
    ]


@contextmanager
def _only_allowed_globals() -> Iterator[None]:
    # What other code in this process has allowed for its own files is not allowed for ours.
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.pth` / `.pt` file with `weights_only=True`, or a `.safetensors` file, onto the CPU.

    Allowed beyond torch's own list: numpy numbers and arrays of numbers. mmengine's logged curves
    (HistoryBuffer in `message_hub`) are read over and come back empty. No fallback to unsafe reading exists.

    Returns:
        The top-level dict as it was saved; for safetensors the tensors by name.

    Raises:
        ValueError: missing, empty, truncated or damaged file; not a checkpoint; a pickle that asks for more; sizes
            that the file's own bytes cannot hold.
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
    try:
        checkpoint = _read(path, head)
    except MemoryError as error:
        raise ValueError(f"checkpoint {path}: asks for more memory than there is; is it the right file?") from error
    check_content(checkpoint, path)
    return checkpoint


def _read(path: Path, head: bytes) -> dict[str, Any]:
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _load_safetensors(path)
    if head.startswith(_ZIP_MAGIC):
        _check_archive(path)
    elif not head.startswith(_PICKLE_MAGIC):
        kinds = [kind for magic, kind in _FOREIGN_MAGICS.items() if head.startswith(magic)]
        raise ValueError(
            f"checkpoint {path}: not a checkpoint but {kinds[0] if kinds else 'some other kind of file'}; "
            "expected a file by torch.save (.pth, .pt) or a .safetensors file"
        )
    checkpoint = _load_torch(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"checkpoint {path}: holds a {type(checkpoint).__name__}; expected a dict with the weights under "
            f"one of {', '.join(map(repr, STATE_DICT_KEYS))}, or the weights themselves by name"
        )
    return checkpoint


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path, device="cpu"))
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path}: no whole safetensors file ({error}); {_AGAIN}") from error


def _check_archive(path: Path) -> None:
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # a damaged directory fails in many ways
        raise ValueError(f"checkpoint {path}: truncated or damaged ({error}); {_AGAIN}") from error
    with archive:
        names = archive.namelist()
        check_archive(archive, path)
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"checkpoint {path}: not a checkpoint but another zip archive (no data.pkl in it)")
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"checkpoint {path}: a TorchScript program; give the checkpoint it was made from")


def _load_torch(path: Path) -> Any:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(f"torch {torch.__version__} cannot read checkpoints safely; install torch >= 2.6")
    try:
        with _only_allowed_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_unsafe_message(path, str(error))) from error
    except MemoryError:
        raise
    except Exception as error:  # unknown bytes fail in any way; all mean the same
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path}: truncated or damaged ({reason}); {_AGAIN}") from error


def _unsafe_message(path: Path, error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", error)
    if found is None:
        return (
            f"checkpoint {path}: not a checkpoint, or one whose pickle torch does not read safely; it was "
            "not loaded. Expected a file by torch.save"
        )
    return (
        f"checkpoint {path}: its pickle asks for {found[1]}, which is more than numbers and could run code; "
        "it was not loaded. If you trust it, read it yourself and save its state dict alone: "
        "torch.save({'state_dict': ...}, FILE)"
    )
