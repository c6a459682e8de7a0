"""The commands that are killed: what they write, and when two results are the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from castling_det.compat.host import mmdet_tool
from castling_det.conversion import load_checkpoint
from castling_det.report.work_dir import find_checkpoint

__all__ = ["ROOT", "Target", "load_libraries", "targets"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "castling_vit"
HYBRID = CONFIGS / "gfl_castling-vit-nano_castling_tree-crowns.py"
DEPLOY = CONFIGS / "gfl_castling-vit-nano_deploy_tree-crowns.py"
ITERATIONS = 24
SHORT = (
    f"train_cfg.max_iters={ITERATIONS}",
    "train_cfg.val_interval=12",
    "default_hooks.checkpoint.interval=4",
    "default_hooks.logger.interval=4",
    "train_dataloader.batch_size=1",
    "val_dataloader.dataset.indices=2",
    "randomness.seed=0",
)
"""Of the demo's training: as it is, for fewer and smaller iterations."""
_PASSING = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+\d\d:\d\d|Z)?|\b[0-9a-f]{40}(\+changes)?")
"""Times, and the commit of a checkout that people work in."""
# Logs are written line by line; a last line that a kill cut short is read over.
_LOGS = "vis_data"


@dataclass(frozen=True)
class Target:
    """A command that writes below one folder."""

    name: str
    command: Callable[[Path], Sequence[str]]
    outcome: Callable[[Path], dict[str, str]]
    """What must be the same after a restart, as hashes by name."""

    def prepare(self, folder: Path) -> None:
        """Makes the folder that the command writes to."""
        folder.mkdir(parents=True)

    def torn(self, folder: Path) -> list[str]:
        """Files under their final names that are not whole."""
        found = []
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            # mmengine dumps the config in place, anew at every start; our reader refuses one that is not whole.
            written_in_place = _LOGS in parts or path.suffix in (".log", ".py")
            hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not hidden and not written_in_place and not _is_whole(path):
                found.append(f"{path.relative_to(folder)} is torn ({path.stat().st_size} bytes)")
        return found


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".pth":
            load_checkpoint(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".onnx":
            import onnx

            onnx.checker.check_model(onnx.load(path), full_check=True)
        elif path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
        elif path.name == "last_checkpoint":
            return Path(path.read_text()).is_file()
    except Exception:  # damaged files fail in many ways
        return False
    return path.stat().st_size > 0


def _hash(value: bytes | str) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else value.encode()).hexdigest()[:16]


def _tensors(entries: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = _hash(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            found |= _tensors(value, f"{prefix}{name}.")
    return found


def _trained(folder: Path) -> dict[str, str]:
    checkpoint = load_checkpoint(folder / f"iter_{ITERATIONS}.pth")
    parts = {name: checkpoint[name] for name in ("state_dict", "ema_state_dict", "optimizer")}
    return {**_tensors(parts), "last_checkpoint": Path((folder / "last_checkpoint").read_text()).name}


def _converted(folder: Path) -> dict[str, str]:
    checkpoint = load_checkpoint(folder / "deploy.pth")
    manifest = json.loads((folder / "deploy.json").read_text())
    sha256 = hashlib.sha256((folder / "deploy.pth").read_bytes()).hexdigest()
    return {
        **_tensors(checkpoint),
        "mask": _hash(json.dumps(manifest["mask"])),
        "drift": _hash(json.dumps(manifest["drift"])),
        "the manifest's file": str(manifest["output"]["sha256"] == sha256),
    }


def _prepared(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): _hash(path.read_bytes()) for path in files}


def _reported(folder: Path) -> dict[str, str]:
    """Without times, commit, and the folder's own name."""
    found = {}
    for name in ("report.json", "report.md", "index.html"):
        found[name] = _hash(_PASSING.sub("", (folder / name).read_text()).replace(str(folder), "FOLDER"))
    return found


def _exported(folder: Path) -> dict[str, str]:
    import onnx

    graph = onnx.load(folder / "deploy.onnx").graph
    return {
        **{f"weight {entry.name}": _hash(entry.SerializeToString()) for entry in graph.initializer},
        "nodes": _hash("\n".join(f"{node.op_type} {list(node.input)} {list(node.output)}" for node in graph.node)),
    }


STUDY = ROOT / "work_dirs" / "study" / "seed0"


def targets(study: Path = STUDY, data: Path = ROOT / "data" / "tree_crowns") -> list[Target]:
    """Every command whose inputs are there: conversion, report and export need trained detectors."""
    wheels = sorted((data / "cache").glob("*.whl"))
    deployed = study / "deploy" / "deploy.pth"
    tools = ROOT / "tools"

    def report(folder: Path) -> list[str]:
        runs = [part for name in ("softmax", "castling", "deploy") for part in ("--run", f"{name}={study / name}")]
        data_options = ["--ann", f"{data}/annotations/val.json", "--images", f"{data}/val", "--out", str(folder)]
        return [f"{tools}/report.py", *runs, "--baseline", "softmax", "--deployed", "deploy", *data_options]

    def train(folder: Path) -> list[str]:
        return [mmdet_tool("train.py"), str(HYBRID), "--work-dir", str(folder), "--resume", "--cfg-options", *SHORT]

    def prepare(folder: Path) -> list[str]:
        return [f"{tools}/dataset_converters/tree_crowns.py", "--root", str(folder / "data"), "--wheel", str(wheels[0])]

    found = []
    if wheels:
        found.append(Target("data preparation", prepare, _prepared))
    if (data / "annotations" / "train.json").is_file():
        found.append(Target("demo training", train, _trained))
    if (study / "castling" / "last_checkpoint").is_file():
        source = find_checkpoint(study / "castling")
        found.append(
            Target(
                "conversion", lambda f: [f"{tools}/convert.py", str(HYBRID), str(source), f"{f}/deploy.pth"], _converted
            )
        )
    if deployed.is_file():
        found.append(Target("report", report, _reported))
        found.append(
            Target(
                "export",
                lambda f: [f"{tools}/export_onnx.py", str(DEPLOY), str(deployed), f"{f}/deploy.onnx"],
                _exported,
            )
        )
    return found


def load_libraries() -> None:
    """What the commands would import one by one, with one thread."""
    torch.set_num_threads(1)
    import matplotlib
    import mmcv.ops  # noqa: F401
    import mmdet.datasets
    import mmdet.evaluation
    import mmdet.models
    import mmdet.visualization  # noqa: F401
    import mmengine.runner  # noqa: F401

    matplotlib.use("Agg")
