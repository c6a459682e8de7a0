"""Builds wheel and sdist twice, each from a fresh copy of the sources, and compares them byte by byte: `make dist`.

Times come from SOURCE_DATE_EPOCH, or from the last commit. Standard library and setuptools only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({target!r}))"


def committed(folder: Path) -> Path:
    """The files of the last commit, written anew into `folder`."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="tar") if hasattr(tarfile, "tar_filter") else files.extractall(folder)
    return folder


def build(kind: str, source: Path, target: Path, *, epoch: str) -> Path:
    """One wheel or sdist, as pip would build it with this environment's setuptools."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-c", BUILD.format(kind=kind, target=str(target))]
    done = subprocess.run(command, cwd=source, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return target / done.stdout.splitlines()[-1]


def build_twice(target: Path, *, epoch: str) -> dict[str, str]:
    """Builds into `target`; the sha256 of each file by its name.

    Raises:
        ValueError: two builds of one kind differ.
    """
    hashes: dict[str, str] = {}
    for kind in ("wheel", "sdist"):
        for _ in range(2):
            with tempfile.TemporaryDirectory() as scratch:
                built = build(kind, committed(Path(scratch, "source")), Path(scratch), epoch=epoch)
                content = built.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if hashes.setdefault(built.name, digest) != digest:
                raise ValueError(f"{built.name}: two builds of one commit differ: {hashes[built.name]}, {digest}")
            target.joinpath(built.name).write_bytes(content)
    return hashes


def main() -> int:
    """Prints sha256 and name of each file, as sha256sum does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results (default: dist/)")
    args = parser.parse_args()
    last = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        hashes = build_twice(args.out, epoch=os.environ.get("SOURCE_DATE_EPOCH") or last.stdout.strip())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, digest in hashes.items():
        print(f"{digest}  {args.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
