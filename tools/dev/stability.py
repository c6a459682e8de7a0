"""Trains the demo's hybrid in half precision on the tree crowns and records whether anything was not finite.

Writes results/stability/PRECISION.json: loss, gradient norm, learning rate and what the mask kept, at 50 iterations.
The precision is that of MMEngine's AmpOptimWrapper, which needs a GPU. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from castling_det.files import write_json
from castling_det.report.records import Series, this_machine
from castling_det.report.work_dirs import read_training_log

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": None}
POINTS = 50


def train_command(work_dir: Path, *, precision: str, iterations: int, batch_size: int) -> list[str]:
    """MMDetection's own training tool on the demo's config."""
    mmdet, dtype = find_spec("mmdet"), DTYPES[precision]
    assert mmdet is not None and mmdet.origin is not None
    options = [
        *(["optim_wrapper.type=AmpOptimWrapper", f"optim_wrapper.dtype={dtype}"] if dtype else []),
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
        f"train_dataloader.batch_size={batch_size}",
        "randomness.seed=0",
        # Every iteration by itself: a mean over some would hide which of them overflowed.
        "default_hooks.logger.interval=1",
        "log_processor.window_size=1",
    ]
    tool = Path(mmdet.origin).parent / ".mim" / "tools" / "train.py"
    return [sys.executable, str(tool), str(CONFIG), "--work-dir", str(work_dir), "--resume", "--cfg-options", *options]


def thinned(series: Series) -> dict[str, list[float | int | None]]:
    """At most `POINTS` values, the last among them."""
    step = -(-len(series.steps) // POINTS)
    kept = range(len(series.steps) - 1, -1, -step)[::-1]
    return {"steps": [series.steps[i] for i in kept], "values": [series.values[i] for i in kept]}


def record(work_dir: Path, *, precision: str, batch_size: int, command: str) -> dict[str, object]:
    """What the training logged; `not_finite` counts logged values that are NaN or infinite.

    With float16 an iteration whose gradients overflow has no finite norm. Its step is skipped, which is no fault.
    """
    log = read_training_log(work_dir)
    traces: dict[str, Series] = {}
    traces |= {name: log.scalars[name] for name in ("loss", "grad_norm", "lr") if name in log.scalars}
    traces |= {f"kept_fraction/{name}": series for name, series in log.mask.kept_fraction.items()}
    norms = traces["grad_norm"].values
    overflows = sum(norm is None for norm in norms) if precision == "fp16" else 0
    return {
        "schema": "castling_det.stability/1",
        "precision": precision,
        "iterations": log.iterations,
        "mask_empty_from": log.mask.empty_from,
        "batch_size": batch_size,
        "not_finite": sum(value is None for series in traces.values() for value in series.values) - overflows,
        "skipped_steps": overflows,
        "max_grad_norm": max((norm for norm in norms if norm is not None), default=None),
        "validation": {name: series.values[-1] for name, series in log.validation.items()},
        "traces": {name: thinned(series) for name, series in traces.items()},
        "command": command,
        "machine": dataclasses.asdict(this_machine()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, records; 1 if the training failed or a logged value is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--iterations", type=int, default=2000, help="default: 2000")
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    args = parser.parse_args(arguments)
    if DTYPES[args.precision] and not torch.cuda.is_available():
        why = "MMEngine's AmpOptimWrapper trains on a GPU only, and torch sees none; --precision fp32 trains anywhere"
        print(f"error: --precision {args.precision}: {why}", file=sys.stderr)
        return 1
    work_dir, options = Path("work_dirs", "stability", args.precision), vars(args)
    code = subprocess.run(train_command(work_dir, **options)).returncode
    if code != 0:
        print(f"error: the training ended with exit code {code}; its log is in {work_dir}", file=sys.stderr)
        return 1
    command = f"python tools/dev/stability.py --precision {args.precision} --iterations {args.iterations}"
    command += f" --batch-size {args.batch_size}"
    found = record(work_dir, precision=args.precision, batch_size=args.batch_size, command=command)
    write_json(ROOT / "results" / "stability" / f"{args.precision}.json", found)
    print(json.dumps({key: value for key, value in found.items() if key != "traces"}, indent=2))
    return int(bool(found["not_finite"]))


if __name__ == "__main__":
    sys.exit(main())
