"""Building this checkout's distributions and installing them, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "README.md", "castling_det.pth", "model-index.yml")
FOLDERS = ("castling_det", "configs", "tools")


def run(command: list[str | Path], cwd: Path, *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs without this process's PYTHONPATH; a failure shows what the command printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def copy_tree(target: Path) -> Path:
    """What git has of the package's sources, its relative links kept as links."""
    target.mkdir()
    for name in SOURCES:
        if ROOT.joinpath(name).exists():
            shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a "wheel", an "sdist" or an "editable" as pip does, with this environment's setuptools."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run([sys.executable, "-c", code], source).stdout.splitlines()[-1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the running one, but of its .pth files setuptools' alone."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def pip(self, *arguments: str | Path) -> None:
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        run([*pip, *arguments], self.folder)

    def install(self, wheel: Path) -> None:
        # The running environment may hold this package as well: pip would call the wheel installed already.
        self.pip("install", "--quiet", "--ignore-installed", "--no-deps", "--no-index", wheel)


def create_environment(folder: Path) -> Environment:
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    environment = Environment(folder)
    host = Path(sysconfig.get_paths()["purelib"])
    # MMEngine imports distutils, which from Python 3.12 on is setuptools', by this line.
    distutils = host / "distutils-precedence.pth"
    line = distutils.read_text(encoding="utf-8") if distutils.is_file() else ""
    environment.site_packages.joinpath("zz_host.pth").write_text(f"{host}\n{line}\n", encoding="utf-8")
    return environment
