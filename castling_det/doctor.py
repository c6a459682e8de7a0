"""What is installed, what works, and what to do about the rest."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import castling_det
from castling_det.compat.host import (
    HOST_PACKAGES,
    INSTALL_HINT,
    host_problems,
    host_warnings,
    installed_distributions,
    release,
)
from castling_det.startup import ROLES, STAND_IN_ORIGIN

__all__ = ["Finding", "examine", "run_doctor"]

REINSTALL = f"reinstall: {INSTALL_HINT}"

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer; `advice` is empty where there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def run_doctor(*, as_json: bool = False) -> int:
    """Prints the findings; 1 if one of them is a problem, else 0."""
    # Other packages' notices at import stay out of the answer; the findings say what they would.
    with open(os.devnull, "w", encoding="utf-8") as sink, redirect_stdout(sink), redirect_stderr(sink):
        findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
            if finding.advice:
                print(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return int(any(finding.status == "problem" for finding in findings))


def examine() -> Iterator[Finding]:
    """Every finding, in the order of what depends on what; a check that fails becomes a problem."""
    for name, check in CHECKS:
        try:
            yield check(name)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            yield Finding(name, "problem", f"{type(error).__name__}: {first_line}", _advice_for(error))


def _advice_for(error: Exception) -> str:
    if "operator torchvision::nms does not exist" in str(error):
        return "torch and torchvision are of different builds: install both anew, from one index"
    if isinstance(error, ImportError) and error.name:
        return f"install what provides {error.name.partition('.')[0]}; for MMDetection: {INSTALL_HINT}"
    return "see the lines above this one first: later checks need the earlier ones"


def _python(name: str) -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 10) <= sys.version_info < (3, 13):
        return Finding(name, "ok", detail)
    return Finding(name, "warning", detail, "Python 3.10 to 3.12 are supported")


def _package(name: str) -> Finding:
    return Finding(name, "ok", f"{castling_det.__version__} at {Path(castling_det.__file__).parent}")


def _torch(name: str) -> Finding:
    import torch
    import torchvision

    detail = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    if release(torch.__version__) < (2, 4):
        return Finding(name, "problem", detail, "install torch >= 2.4")
    return Finding(name, "ok", detail)


def _timm(name: str) -> Finding:
    import timm

    return Finding(name, "ok", timm.__version__)


def _host(name: str) -> Finding:
    found = [installed_distributions(package) for package in HOST_PACKAGES]
    detail = ", ".join(f"{distribution} {number}" for group in found for distribution, number in group)
    if problems := host_problems():
        return Finding(name, "problem", detail or "none", f"{'; '.join(problems)}: {INSTALL_HINT}")
    if any(len(group) > 1 for group in found):
        advice = "two distributions wrote into one folder: uninstall both, then install one of them"
        return Finding(name, "problem", detail, advice)
    if warnings := host_warnings():
        return Finding(name, "warning", detail, "; ".join(warnings))
    return Finding(name, "ok", detail)


def _operators(name: str) -> Finding:
    import mmcv.ops  # noqa: F401  # loads the operators as MMDetection does

    module = sys.modules["mmcv._ext"]
    spec = module.__spec__
    if spec is not None and spec.origin == STAND_IN_ORIGIN:
        from castling_det.compat.stand_in import STAND_INS

        return Finding(name, "ok", f"{len(STAND_INS)} stand-ins by torchvision and torch, none compiled")
    return Finding(name, "ok", f"compiled, {module.__file__}")


def _detection(name: str) -> Finding:
    import mmdet.models  # the import that fails without operators

    return Finding(name, "ok", f"mmdet.models imports, mmdet {mmdet.__version__}")


def _cuda(name: str) -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return Finding(name, "ok", f"no GPU in use, everything runs on the CPU (torch built with {built})")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(name, "ok", f"CUDA {torch.version.cuda}: {', '.join(devices)}")


def _threads(name: str) -> Finding:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"torch uses {threads}, {cores} cores are available"
    if threads > cores:
        return Finding(name, "warning", detail, f"export OMP_NUM_THREADS={cores}")
    return Finding(name, "ok", detail)


def _registry(name: str) -> Finding:
    from mmengine.registry import MODELS

    wanted = ("castling_det.CastlingViT", "castling_det.SimpleFeaturePyramid", "mmdet.GFL")
    missing = [key for key in wanted if MODELS.get(key) is None]
    if missing:
        return Finding(name, "problem", f"not found: {', '.join(missing)}", REINSTALL)
    return Finding(name, "ok", f"{', '.join(wanted)} are found")


def _startup(name: str) -> Finding:
    # A new interpreter that imports nothing of ours, as MMDetection's tools/train.py does.
    code = "import sys; print(sum(hasattr(finder, 'castling_det_role') for finder in sys.meta_path))"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()
    )
    if child.stdout.split()[-1:] == [str(len(ROLES))]:
        return Finding(name, "ok", "castling_det.pth is active, MMDetection's own tools see this package")
    return Finding(
        name,
        "problem",
        "castling_det.pth is not active in a new interpreter",
        "install with pip (`pip install castling-det` or `pip install -e .`): a PYTHONPATH does not read it",
    )


def _host_tools(name: str) -> Finding:
    from castling_det.compat.host import mmdet_tool

    return Finding(name, "ok", str(Path(mmdet_tool("train.py")).parent))


def _configs(name: str) -> Finding:
    from mmengine.config import Config

    from castling_det.registry import MODELS

    folder = Path(castling_det.__file__).parent / ".mim" / "configs"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("[!_]*/*.py"))
    if not names:
        return Finding(name, "problem", f"no config in {folder}", REINSTALL)
    with tempfile.TemporaryDirectory() as scratch:
        user = Path(scratch, "user_config.py")
        user.write_text(f"_base_ = 'castling_det::{names[0]}'\n", encoding="utf-8")
        config = Config.fromfile(user)
    # mmengine builds what comes from such a base in our scope, MMDetection's own types included.
    if MODELS.get(config.model.type) is None:
        return Finding(name, "problem", f"{config.model.type} is not found by {names[0]}", REINSTALL)
    return Finding(name, "ok", f"castling_det::{names[0]} and {len(names) - 1} more")


CHECKS: tuple[tuple[str, Callable[[str], Finding]], ...] = (
    ("python", _python),
    ("castling_det", _package),
    ("torch", _torch),
    ("timm", _timm),
    ("host", _host),
    ("operators", _operators),
    ("detection", _detection),
    ("cuda", _cuda),
    ("threads", _threads),
    ("registry", _registry),
    ("start-up", _startup),
    ("tools", _host_tools),
    ("configs", _configs),
)
