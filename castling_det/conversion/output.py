"""What a conversion writes: a checkpoint, and a JSON record of it beside the file."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from castling_det.files import atomic_write

__all__ = ["check_paths", "manifest_path", "write_with_record"]


def manifest_path(out: str | os.PathLike[str]) -> Path:
    """Where the manifest of a converted checkpoint lies: beside it, with the suffix `.json`."""
    return Path(out).with_suffix(".json")


def check_paths(source: Path, out: Path) -> None:
    """Whether `out` is a file that can be written without losing `source`.

    Raises:
        ValueError: it is not.
    """
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"output {out}: expected a .pth file; the manifest takes the same name with .json")
    if out.is_dir():
        raise ValueError(f"output {out}: is a folder; give the file to write")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"output {out}: is the source, whose training state would be lost; give another name")


def write_with_record(out: Path, content: bytes, record: dict[str, Any], *, config: str | None = None) -> None:
    """The checkpoint and the record beside it, all or nothing.

    Args:
        out: the checkpoint. content: its bytes. record: of the file beside it, `.json`.
        config: text of a config beside them, `.py`, for a checkpoint that loads into no config of the training's.

    Raises:
        OSError: they cannot be written, such as on a full disk.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        # All contents are on disk before any file takes its name.
        with ExitStack() as parts:
            if config is not None:
                config_part = parts.enter_context(atomic_write(out.with_suffix(".py")))
                config_part.write_text(config, encoding="utf-8")
            manifest_part = parts.enter_context(atomic_write(manifest_path(out)))
            checkpoint_part = parts.enter_context(atomic_write(out))
            manifest_part.write_text(text, encoding="utf-8")
            checkpoint_part.write_bytes(content)
    except OSError as error:
        message = f"output {out}: cannot be written ({error.strerror}); an older one is as it was"
        raise OSError(error.errno, message) from error
