"""Which mmengine, mmcv and mmdet are installed, and whether this package works with them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "HOST_PACKAGES",
    "HostPackage",
    "check_host",
    "host_problems",
    "host_warnings",
    "installed_distributions",
    "mmdet_tool",
]

INSTALL_HINT = "pip install 'castling-det[onedl]'"
EXPORTING_TORCH = "2.8"
"""The first version whose exporters take our detectors: 2.6 and 2.7 were seen to fail."""


@dataclass(frozen=True)
class HostPackage:
    """A module that the host provides, the distributions that carry it, and the supported versions."""

    module: str
    distributions: tuple[str, ...]
    minimum: str
    below: str


HOST_PACKAGES = (
    HostPackage("mmengine", ("onedl-mmengine", "mmengine", "mmengine-lite"), minimum="0.10.0", below="1"),
    HostPackage("mmcv", ("onedl-mmcv", "mmcv", "mmcv-lite", "mmcv-full"), minimum="2.1.0", below="3"),
    HostPackage("mmdet", ("onedl-mmdetection", "mmdet"), minimum="3.3.0", below="4"),
)


def release(version_text: str) -> tuple[int, ...]:
    """The numbers that start a version: (2, 11, 0) of "2.11.0+cu130"."""
    match = re.match(r"\d+(?:\.\d+)*", version_text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def installed_distributions(package: HostPackage) -> list[tuple[str, str]]:
    """Name and version of each installed distribution with the module; more than one is a conflict."""
    found = []
    for name in package.distributions:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def host_problems() -> list[str]:
    """One sentence for each thing that keeps MMDetection from working with this package; imports nothing."""
    problems = []
    installed: dict[str, tuple[str, str]] = {}
    for package in HOST_PACKAGES:
        distributions = installed_distributions(package)
        if not distributions:
            # A source checkout on the path has no metadata; its version is then the user's own affair.
            if find_spec(package.module) is None:
                problems.append(f"{package.module} is not installed")
            continue
        name, found = installed[package.module] = distributions[0]
        if not release(package.minimum) <= release(found) < release(package.below):
            problems.append(
                f"{name} {found} is not supported, {package.module} must be >= {package.minimum} and < {package.below}"
            )
    mmdet, mmcv = installed.get("mmdet", ("", "")), installed.get("mmcv", ("", ""))
    if mmdet[0] == "mmdet" and release(mmdet[1])[:2] == (3, 3) and release(mmcv[1]) >= (2, 2):
        problems.append(f"mmdet {mmdet[1]} accepts mmcv below 2.2.0 only, and {mmcv[0]} {mmcv[1]} is installed")
    return problems


def host_warnings() -> list[str]:
    """One sentence with its fix for each thing that works in part only; imports nothing."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return []
    if release(torch) < (2, 6):
        return [
            f"torch {torch} cannot read checkpoints safely: training works, but conversion, export and pre-trained "
            f"weights are refused; {INSTALL_HINT} with torch >= {EXPORTING_TORCH}"
        ]
    if release(torch) < release(EXPORTING_TORCH):
        return [
            *_engine_warnings(torch),
            f"torch {torch} cannot export detectors, to ONNX: training and "
            f"conversion work; {INSTALL_HINT} with torch >= {EXPORTING_TORCH}",
        ]
    return _engine_warnings(torch)


def mmdet_tool(name: str) -> str:
    """The path of one of MMDetection's own tools, such as `train.py`, in the installed package.

    Raises:
        ImportError: MMDetection is not installed, or without its tools.
    """
    spec = find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise ImportError(f"MMDetection is not installed: {INSTALL_HINT}")
    path = Path(spec.origin).parent / ".mim" / "tools" / name
    if not path.is_file():
        raise ImportError(f"{path} is missing: MMDetection was installed without its tools; reinstall it from a wheel")
    return str(path)


def _engine_warnings(torch: str) -> list[str]:
    engine = next(iter(installed_distributions(HOST_PACKAGES[0])), ("", ""))
    if engine[0] in ("mmengine", "mmengine-lite") and release(engine[1]) < (0, 10, 8):
        return [
            f"{engine[0]} {engine[1]} cannot load its own checkpoints on torch {torch}: training works, but --resume, "
            f"load_from and tools/test.py fail; {INSTALL_HINT}"
        ]
    return []


def check_host() -> None:
    """Raises one ImportError that names every problem and what to install; logs what works in part only."""
    problems = host_problems()
    if problems:
        raise ImportError(
            f"castling_det needs MMDetection 3.x: {'; '.join(problems)}. "
            f"Install a supported host with {INSTALL_HINT} (or 'castling-det[upstream]'); "
            "`castling-det doctor` prints what is installed."
        )
    # From the main process only: not from data-loading workers or other ranks.
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        for warning in host_warnings():
            logging.getLogger("castling_det").warning(warning)
