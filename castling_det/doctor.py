"""`castling-det doctor`: what is installed, what works, and what to do about the rest."""

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
from importlib.util import find_spec
from pathlib import Path

import castling_det
from castling_det.compat import host
from castling_det.startup import STAND_IN_ORIGIN

__all__ = ["CHECKS", "Finding", "Trouble", "examine", "run_doctor"]

REINSTALL = f"reinstall: {host.INSTALL_HINT}"


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    status: str  # "ok", "warning" or "problem"
    detail: str
    advice: str = ""


class Trouble(Exception):
    """What a check saw that is wrong, and what to do about it."""

    def __init__(self, detail: str, advice: str, status: str = "problem") -> None:
        super().__init__(detail)
        self.advice = advice
        self.status = status


def run_doctor(*, as_json: bool = False) -> int:
    """Prints the findings; 1 if one of them is a problem, else 0."""
    # Notices of other packages at import stay out of the answer; the findings say the same.
    with open(os.devnull, "w", encoding="utf-8") as sink, redirect_stdout(sink), redirect_stderr(sink):
        findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
            if finding.advice:
                print(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return int(any(finding.status == "problem" for finding in findings))


def examine() -> Iterator[Finding]:
    """Runs `CHECKS`; one that raises is a problem. Without torch and MMDetection, those of exported detectors alone."""
    training = find_spec("torch") is not None or find_spec("mmdet") is not None
    for name, check in CHECKS:
        if not training and name not in WITHOUT_TRAINING:
            continue
        try:
            yield Finding(name, "ok", check())
        except Trouble as trouble:
            yield Finding(name, trouble.status, str(trouble), trouble.advice)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            yield Finding(name, "problem", f"{type(error).__name__}: {first_line}", _advice_for(error))


def _advice_for(error: Exception) -> str:
    if "operator torchvision::nms does not exist" in str(error):
        return "torch and torchvision are of different builds: install both anew, from one index"
    if isinstance(error, ImportError) and error.name:
        return f"install what provides {error.name.partition('.')[0]}; for MMDetection: {host.INSTALL_HINT}"
    return "mend the lines above this one first: later checks need the earlier ones"


def _python() -> str:
    detail = f"{platform.python_version()} at {sys.executable}"
    if not (3, 10) <= sys.version_info < (3, 13):
        raise Trouble(detail, "Python 3.10 to 3.12 are supported", "warning")
    return detail


def _torch() -> str:
    import timm
    import torch
    import torchvision

    detail = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    if host.release(torch.__version__) < (2, 4):
        raise Trouble(detail, "install torch >= 2.4")
    return detail


def _host() -> str:
    found = [host.installed_distributions(package) for package in host.HOST_PACKAGES]
    detail = ", ".join(f"{distribution} {number}" for group in found for distribution, number in group)
    if problems := host.host_problems():
        raise Trouble(detail or "none", f"{'; '.join(problems)}: {host.INSTALL_HINT}")
    if any(len(group) > 1 for group in found):
        raise Trouble(detail, "two distributions wrote into one folder: uninstall both, then install one of them")
    if warnings := host.host_warnings():
        raise Trouble(detail, "; ".join(warnings), "warning")
    return detail


def _operators() -> str:
    import mmcv.ops  # noqa: F401  # loads the operators as MMDetection does
    import mmdet.models  # noqa: F401  # the import that fails without operators

    module = sys.modules["mmcv._ext"]
    if module.__spec__ is None or module.__spec__.origin != STAND_IN_ORIGIN:
        return f"compiled, {module.__file__}"
    from castling_det.compat.stand_in import STAND_INS

    return f"{len(STAND_INS)} stand-ins by torchvision and torch, none compiled"


def _devices() -> str:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    detail = f"CUDA {torch.version.cuda}: {', '.join(gpus)}" if gpus else "no GPU in use, everything runs on the CPU"
    detail += f"; torch uses {threads} threads, {cores} cores are available"
    if threads > cores:
        raise Trouble(detail, f"export OMP_NUM_THREADS={cores}", "warning")
    return detail


def _registry() -> str:
    from mmengine.registry import MODELS

    wanted = ("castling_det.CastlingViT", "castling_det.SimpleFeaturePyramid", "mmdet.GFL")
    if missing := [key for key in wanted if MODELS.get(key) is None]:
        raise Trouble(f"not found: {', '.join(missing)}", REINSTALL)
    return f"{', '.join(wanted)} are found"


def _startup() -> str:
    # A new interpreter that imports nothing of ours, as MMDetection's tools/train.py does.
    code = "import sys; print(sum(hasattr(finder, 'castling_det_hook') for finder in sys.meta_path))"
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
    if child.stdout.split()[-1:] != ["1"]:
        raise Trouble(
            "castling_det.pth is not active in a new interpreter",
            "install with pip (`pip install castling-det` or `pip install -e .`): a PYTHONPATH does not read it",
        )
    return "castling_det.pth is active, MMDetection's own tools see this package"


def _configs() -> str:
    from mmengine.config import Config

    from castling_det.registry import MODELS

    folder = Path(castling_det.__file__).parent / ".mim" / "configs"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("[!_]*/*.py"))
    if not names:
        raise Trouble(f"no config in {folder}", REINSTALL)
    with tempfile.TemporaryDirectory() as scratch:
        user = Path(scratch, "user_config.py")
        user.write_text(f"_base_ = 'castling_det::{names[0]}'\n", encoding="utf-8")
        config = Config.fromfile(user)
    # MMEngine builds a config with such a base in our scope, MMDetection's own types included.
    if MODELS.get(config.model.type) is None:
        raise Trouble(f"{config.model.type} is not found by {names[0]}", REINSTALL)
    return f"castling_det::{names[0]} and {len(names) - 1} more"


def _runtime() -> str:
    missing = [name for name in ("cv2", "onnxruntime", "msgspec") if find_spec(name) is None]
    if missing:
        advice = "pip install 'castling-det[runtime]' where exported detectors run"
        raise Trouble(f"{', '.join(missing)} not installed", advice, "warning")
    import cv2
    import onnxruntime

    from castling_det.runtime.detector import Detector

    count = len(Detector("scores-nano").classes)
    return f"onnxruntime {onnxruntime.__version__}, OpenCV {cv2.__version__}; scores-nano loads, {count} classes"


WITHOUT_TRAINING = ("python", "castling_det", "exported detectors")
"""Checks that a machine needs which detects and does not train."""

CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("python", _python),
    ("castling_det", lambda: f"{castling_det.__version__} at {Path(castling_det.__file__).parent}"),
    ("exported detectors", _runtime),
    ("torch", _torch),
    ("host", _host),
    ("operators", _operators),
    ("devices", _devices),
    ("registry", _registry),
    ("start-up", _startup),
    ("tools", lambda: str(Path(host.mmdet_tool("train.py")).parent)),
    ("configs", _configs),
)
"""Name and check: returns what it saw, raises Trouble or any error."""
