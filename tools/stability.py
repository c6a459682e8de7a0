"""Trains the demo's hybrid in half precision on the tree crowns and records whether anything was not finite.

`results/stability/PRECISION.json`: loss, gradient norm, learning rate and what the mask kept, at each iteration; with
float16 the loss scale. A step that overflowed is skipped and counted. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
WRAPPERS = {
    "bf16": ("optim_wrapper.type=castling_det.Bf16OptimWrapper",),
    "fp16": ("optim_wrapper.type=castling_det.Fp16OptimWrapper", "optim_wrapper.growth_interval=200"),
    "fp32": (),
}


def train_command(work_dir: Path, *, precision: str, iterations: int, batch_size: int) -> list[str]:
    """MMDetection's own training tool on the demo's config."""
    from castling_det.compat.host import mmdet_tool

    options = (
        *WRAPPERS[precision],
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
        f"train_dataloader.batch_size={batch_size}",
        "randomness.seed=0",
        # Every iteration by itself: a mean over some would hide which of them overflowed.
        "default_hooks.logger.interval=1",
        "log_processor.window_size=1",
    )
    resume = ("--work-dir", str(work_dir), "--resume")
    return [sys.executable, mmdet_tool("train.py"), str(CONFIG), *resume, "--cfg-options", *options]


def skipped_steps(scales: Sequence[float | None]) -> int:
    """How many iterations overflowed, given the loss scale that each began with: after such a one it is lower."""
    known = [scale for scale in scales if scale is not None]
    return sum(after < before for before, after in itertools.pairwise(known))


def record(work_dir: Path, *, precision: str, batch_size: int, command: str) -> dict[str, object]:
    """What the training logged; `not_finite` counts logged values that are NaN or infinite."""
    from dataclasses import asdict

    from castling_det.report.records import Series, this_machine
    from castling_det.report.work_dirs import read_training_log

    log = read_training_log(work_dir)
    wanted = ("loss", "grad_norm", "lr", "loss_scale")
    traces: dict[str, Series] = {name: log.scalars[name] for name in wanted if name in log.scalars}
    traces |= {f"kept_fraction/{name}": series for name, series in log.mask.kept_fraction.items()}
    scales = log.scalars["loss_scale"].values if "loss_scale" in log.scalars else ()
    skipped = skipped_steps(scales)
    norms = traces["grad_norm"].values
    others = (series for name, series in traces.items() if name != "grad_norm")
    not_finite = sum(value is None for series in others for value in series.values)
    # A step that overflowed has no finite norm, and was skipped for it: that one is counted as such.
    not_finite += max(0, sum(value is None for value in norms) - skipped)
    return {
        "schema": "castling_det.stability/1",
        "precision": precision,
        "iterations": log.iterations,
        "mask_empty_from": log.mask.empty_from,
        "batch_size": batch_size,
        "not_finite": not_finite,
        "skipped_steps": skipped,
        "max_grad_norm": max((norm for norm in norms if norm is not None), default=None),
        "validation": {name: series.values[-1] for name, series in log.validation.items()},
        "traces": {name: asdict(series.thinned()) for name, series in traces.items()},
        "command": command,
        "machine": asdict(this_machine()),
    }


def main() -> int:
    """Trains, records; 1 if the training failed or a logged value is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=WRAPPERS, default="bf16", help="default: bf16")
    parser.add_argument("--iterations", type=int, default=2000, help="default: 2000")
    parser.add_argument("--batch-size", type=int, default=4, help="float16 is slow on a CPU (default: 4)")
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/stability/PRECISION")
    parser.add_argument("--out", type=Path, help="default: results/stability/PRECISION.json")
    args = parser.parse_args()
    from castling_det.files import write_json

    work_dir = args.work_dir or Path("work_dirs", "stability", args.precision)
    out = args.out or ROOT / "results" / "stability" / f"{args.precision}.json"
    options = {"precision": args.precision, "batch_size": args.batch_size}
    code = subprocess.run(train_command(work_dir, iterations=args.iterations, **options)).returncode
    if code != 0:
        print(f"error: the training ended with exit code {code}; its log is in {work_dir}", file=sys.stderr)
        return 1
    command = f"python tools/stability.py --precision {args.precision} --iterations {args.iterations}"
    found = record(work_dir, command=f"{command} --batch-size {args.batch_size}", **options)
    write_json(out, found)
    print(json.dumps({key: value for key, value in found.items() if key != "traces"}, indent=2))
    return int(bool(found["not_finite"]))


if __name__ == "__main__":
    sys.exit(main())
