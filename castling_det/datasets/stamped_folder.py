"""A folder of generated files that is replaced as a whole and knows what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from .wheel import PreparationError

try:
    import fcntl
except ImportError:  # No such module outside POSIX: there two runs at a time are the user's to avoid.
    fcntl = None  # type: ignore[assignment]

__all__ = ["StampedFolder", "Transaction"]

STAMP = "prepared.json"
STAGING = ".partial"


@dataclass
class Transaction:
    """A replacement under way: fill `staging`, then call `record` with the summary to store."""

    staging: Path
    summary: dict[str, Any] | None = None

    def record(self, summary: dict[str, Any]) -> None:
        """Keeps the JSON-ready summary for the stamp."""
        self.summary = summary


class StampedFolder:
    """`root` with the generated sub-folders `parts` and a stamp, `prepared.json`.

    The stamp is written last. It holds the request, the summary, and each file's size in bytes.
    """

    def __init__(self, root: Path, *, parts: Sequence[str]) -> None:
        self.root = root
        self.parts = tuple(parts)
        self.stamp = root / STAMP

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; a second one waits. The lock ends with the process, however it ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as handle:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def finished(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The stored summary if the folder is complete and was made from this very request, else None."""
        stored = self._read_stamp()
        if not stored.get("complete") or stored.get("request") != request:
            return None
        for name, size in stored["files"].items():
            path = self.root / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        summary: dict[str, Any] = stored["summary"]
        return summary

    @contextmanager
    def replacing(self, request: dict[str, Any]) -> Iterator[Transaction]:
        """Puts a filled staging folder in the place of the old parts, if the body ends without an error."""
        self._refuse_foreign_files()
        staging = self.root / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            transaction = Transaction(staging)
            yield transaction
            files = {
                path.relative_to(staging).as_posix(): path.stat().st_size
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            }
            # From here to the last line the folder is incomplete, and says so.
            write_json(self.stamp, {"complete": False, "request": request})
            for part in self.parts:
                shutil.rmtree(self.root / part, ignore_errors=True)
                (staging / part).rename(self.root / part)
            done = {"complete": True, "request": request, "summary": transaction.summary, "files": files}
            write_json(self.stamp, done)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _read_stamp(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def _refuse_foreign_files(self) -> None:
        """Only folders that a stamp claims may be replaced: `root` may be any folder of the user's."""
        taken = [part for part in self.parts if (self.root / part).exists()]
        if taken and not self.stamp.is_file():
            raise PreparationError(
                f"{self.root} already holds {', '.join(taken)}, not made by this preparation; they would be "
                "replaced. Give another --root, or move them away."
            )
