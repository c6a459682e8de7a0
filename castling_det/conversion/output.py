"""What a conversion writes: a checkpoint, and a JSON record of it beside the file."""

from __future__ import annotations

import json
import os
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


def write_with_record(out: Path, content: bytes, record: dict[str, Any]) -> None:
    """The checkpoint and the record beside it, both or neither.

    Raises:
        OSError: they cannot be written, such as on a full disk.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        # Both contents are on disk before either file takes its name.
        with atomic_write(manifest_path(out)) as manifest_part, atomic_write(out) as checkpoint_part:
            manifest_part.write_text(text, encoding="utf-8")
            checkpoint_part.write_bytes(content)
    except OSError as error:
        message = f"output {out}: cannot be written ({error.strerror}); an older one is as it was"
        raise OSError(error.errno, message) from error
