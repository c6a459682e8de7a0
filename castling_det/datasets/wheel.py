"""A pinned wheel as a source of data: fetched with pip, accepted by its SHA-256 only, read in place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import atomic_write, sha256_of

__all__ = ["PinnedWheel", "PreparationError", "obtain_wheel", "read_members"]


class PreparationError(RuntimeError):
    """The data cannot be prepared here and now; the message says why and what to do."""


@dataclass(frozen=True)
class PinnedWheel:
    """One file of one release on the package index, named by its content."""

    project: str
    version: str
    filename: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The exact requirement as pip takes it."""
        return f"{self.project}=={self.version}"


def _check_hash(path: Path, pinned: PinnedWheel, origin: str, advice: str) -> None:
    found = sha256_of(path)
    if found != pinned.sha256:
        raise PreparationError(
            f"{origin} is not {pinned.filename}: its SHA-256 is {found}, expected {pinned.sha256}. "
            f"Nothing was taken from it. {advice}"
        )


def _run_pip(pinned: PinnedWheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), pinned.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return
    by_hand = (
        f"on a machine with a connection run `python -m pip download --no-deps {pinned.requirement}`, "
        "copy the file here and pass it with --wheel FILE (argument `wheel` of prepare)"
    )
    if "No module named pip" in run.stderr:
        raise PreparationError(
            f"{pinned.requirement} cannot be downloaded: this Python ({sys.executable}) has no pip. "
            f"Run `{sys.executable} -m ensurepip`, or {by_hand}."
        )
    lines = [line for line in run.stderr.splitlines() if line.strip()][-6:]
    raise PreparationError(
        f"pip could not download {pinned.requirement} (exit code {run.returncode}). Check the connection to "
        f"the package index (`{sys.executable} -m pip config list` shows which one is set), or {by_hand}. "
        "The last lines of pip:\n  " + "\n  ".join(lines)
    )


def obtain_wheel(pinned: PinnedWheel, cache: Path, wheel: Path | None = None) -> Path:
    """A local file with the pinned content: `wheel` if given, else the one in `cache`, downloaded if need be.

    A cached copy with the wrong content is replaced. Raises PreparationError if pip is missing or fails, or
    if the content of `wheel` or of the download differs from the pin.
    """
    if wheel is not None:
        if not wheel.is_file():
            raise PreparationError(f"--wheel {wheel}: no such file. Pass the path of {pinned.filename}.")
        _check_hash(
            wheel, pinned, f"--wheel {wheel}", f"Pass {pinned.filename} as the package index serves it."
        )
        return wheel
    cached = cache / pinned.filename
    if cached.is_file() and sha256_of(cached) == pinned.sha256:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as name:
        folder = Path(name)
        _run_pip(pinned, folder)
        found = sorted(folder.iterdir())
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "nothing"
            raise PreparationError(f"pip download of {pinned.requirement} left {names}, expected one wheel.")
        advice = "The package index serves another file: check its settings, or pass the right --wheel FILE."
        _check_hash(found[0], pinned, f"The download of {pinned.requirement} ({found[0].name})", advice)
        with atomic_write(cached) as temporary:
            shutil.copyfile(found[0], temporary)
    return cached


def read_members(wheel: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content of the named members. Nothing is unpacked, so no member's name can lead out of a folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in names}
    except (KeyError, zipfile.BadZipFile) as error:
        raise PreparationError(f"{wheel.name} does not hold what is needed: {error}.") from error
