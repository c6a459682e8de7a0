"""Runs the test suite on another stack, in an environment of its own: `make test-stack STACK=upstream`.

A stack is requirements/default.txt with a few lines changed. Standard library only: it runs before anything is
installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONEDL = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection")
SHOWN = ("torch", "torchvision", "numpy", "timm", "mmengine", "mmcv", "mmcv-lite", "mmdet", *ONEDL)


@dataclass(frozen=True)
class Stack:
    """What is installed otherwise than requirements/default.txt and constraints.txt say."""

    about: str
    pins: tuple[str, ...] = ()
    """Requirements that take the place of those of the same name, or are added."""
    without: tuple[str, ...] = ()


STACKS = {
    "onedl": Stack("the default: what `make setup` installs"),
    "upstream": Stack(
        "MMDetection 3.3 as OpenMMLab published it",
        pins=(
            "torch==2.5.1",
            "torchvision==0.20.1",
            "numpy==1.26.4",
            "sympy==1.13.1",  # the only one that this torch accepts
            "mmengine==0.10.7",
            "mmcv-lite==2.1.0",
            "mmdet==3.3.0",
            "onnx==1.19.1",  # the last ones for numpy 1, down to opencv
            "ml_dtypes==0.5.3",
            "opencv-python==4.11.0.86",
            "opencv-python-headless==4.11.0.86",
        ),
        without=(*ONEDL, "sahi"),  # sahi wants an opencv for numpy 2
    ),
    # Older torch reads checkpoints unsafely, so that this package reads none there.
    "oldest": Stack("the default on the oldest torch", pins=("torch==2.6.0", "torchvision==0.21.0", "sympy==1.13.1")),
    "newest": Stack("the default on the newest torch", pins=("torch==2.14.1", "torchvision==0.29.1")),
}


def project_name(requirement: str) -> str:
    """The normalised name at the start of a requirement; empty for comments, options and empty lines."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement.strip())
    return re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""


def requirement_lines(stack: Stack, lines: Iterable[str], *, add: bool) -> list[str]:
    """The requirements among `lines` with the stack's own in their places; `add` also those that are not among them."""
    pins = {project_name(pin): pin for pin in stack.pins}
    kept = [line.strip() for line in lines if project_name(line) and project_name(line) not in {*pins, *stack.without}]
    names = {project_name(line) for line in lines}
    return kept + [pin for name, pin in pins.items() if add or name in names]


def install(stack: Stack, environment: Path, *, python: str) -> None:
    """Creates the environment, or leaves one that was finished with the same requirements.

    Raises:
        subprocess.CalledProcessError: a command of it failed; what it printed is on the terminal.
    """
    folder = ROOT / "requirements"
    wanted = requirement_lines(stack, (folder / "default.txt").read_text(encoding="utf-8").splitlines(), add=True)
    pinned = requirement_lines(stack, (folder / "constraints.txt").read_text(encoding="utf-8").splitlines(), add=False)
    ready = environment / ".ready"
    content = "\n".join([*wanted, "", *pinned, ""])
    if ready.is_file() and ready.read_text(encoding="utf-8") == content:
        return
    ready.unlink(missing_ok=True)
    subprocess.run([python, "-m", "venv", "--clear", environment], check=True)
    environment.joinpath("requirements.txt").write_text("\n".join(wanted), encoding="utf-8")
    environment.joinpath("constraints.txt").write_text("\n".join(pinned), encoding="utf-8")
    python_here = environment / "bin" / "python"
    pip: list[str | Path] = [python_here, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    build = [pin for pin in wanted if project_name(pin) in ("setuptools", "wheel")]
    files: list[str | Path] = ["-r", environment / "requirements.txt", "-c", environment / "constraints.txt"]
    steps: tuple[Sequence[str | Path], ...] = (build, files, ["--no-deps", "--no-build-isolation", "--editable", ROOT])
    for arguments in steps:
        subprocess.run([*pip, *arguments], check=True)
    ready.write_text(content, encoding="utf-8")


def run_suite(environment: Path, arguments: Sequence[str]) -> tuple[int, Path]:
    """pytest's exit code, and its JUnit file."""
    junit = environment / "junit.xml"
    junit.unlink(missing_ok=True)
    # The suite starts commands by name too: they must be this environment's.
    path = os.pathsep.join([str(environment / "bin"), os.environ.get("PATH", "")])
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command: list[str | Path] = [environment / "bin" / "python", "-m", "pytest", "-q", f"--junitxml={junit}"]
    command.extend(arguments)
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode, junit


def counts(junit: Path) -> dict[str, int]:
    """How many tests passed, failed (errors included) and were skipped."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(junit).iter("testsuite"):
        for name in total:
            total[name] += int(suite.get(name, "0"))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def versions(environment: Path) -> dict[str, str]:
    """The versions that tell one stack from another, Python's first."""
    code = (
        "import json, platform\nfrom importlib.metadata import version, PackageNotFoundError\n"
        f"found = {{'python': platform.python_version()}}\nfor name in {SHOWN!r}:\n"
        "    try:\n        found[name] = version(name)\n    except PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    command: list[str | Path] = [environment / "bin" / "python", "-c", code]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def commit() -> str:
    """The commit that is tested, with `+changes` if tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def main() -> int:
    """Installs, tests, records; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack", choices=STACKS, help="; ".join(f"{name}: {s.about}" for name, s in STACKS.items()))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--record", type=Path, help="write versions and counts to this JSON file")
    parser.add_argument("--install-only", action="store_true", help="stop before the tests")
    parser.add_argument("--pytest", default="", help="""arguments of pytest, such as --pytest="-m 'not slow'" """)
    args = parser.parse_args()
    stack, environment = STACKS[args.stack], ROOT / f".venv-{args.stack}"
    install(stack, environment, python=args.python)
    print(f"{args.stack}: {versions(environment)}", flush=True)
    if args.install_only:
        return 0
    tested = commit()
    began = time.monotonic()
    code, junit = run_suite(environment, shlex.split(args.pytest))
    if args.record and junit.is_file():
        record = {
            "stack": args.stack,
            "about": stack.about,
            "versions": versions(environment),
            **counts(junit),
            "seconds": round(time.monotonic() - began),
            "commit": tested,
            "command": f"make test-stack STACK={args.stack}" + (f' PYTEST="{args.pytest}"' if args.pytest else ""),
        }
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
