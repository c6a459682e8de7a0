"""Trains the demo's hybrid in bfloat16 on the tree crowns and records whether anything was not finite.

`results/stability/bf16.json`: loss, gradient norm, learning rate and what the mask kept, over the iterations. On a GPU
`--precision fp16` trains with loss scaling and records the scale too. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
WRAPPERS = {
    "bf16": ("optim_wrapper.type=castling_det.Bf16OptimWrapper",),
    "fp16": ("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.dtype=float16", "optim_wrapper.loss_scale=dynamic"),
    "fp32": (),
}


def train_command(work_dir: Path, *, precision: str, iterations: int) -> list[str]:
    """MMDetection's own training tool on the demo's config."""
    from castling_det.experiments import mmdet_tool

    options = (
        *WRAPPERS[precision],
        f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}",
        "randomness.seed=0",
    )
    resume = ("--work-dir", str(work_dir), "--resume")
    return [sys.executable, mmdet_tool("train.py"), str(CONFIG), *resume, "--cfg-options", *options]


def record(work_dir: Path, *, precision: str, command: str) -> dict[str, object]:
    """What the training logged; `not_finite` counts logged values that are NaN or infinite."""
    from dataclasses import asdict

    from castling_det.analysis.codec import to_jsonable
    from castling_det.analysis.machine import this_machine
    from castling_det.analysis.record import Series
    from castling_det.analysis.scalars import read_training_log

    log = read_training_log(work_dir)
    wanted = ("loss", "grad_norm", "lr", "loss_scale")
    traces: dict[str, Series] = {name: log.scalars[name] for name in wanted if name in log.scalars}
    traces |= {f"kept_fraction/{name}": series for name, series in log.mask.kept_fraction.items()}
    every = [*traces.values(), *log.validation.values()]
    return {
        "schema": "castling_det.stability/1",
        "precision": precision,
        "iterations": log.iterations,
        "mask_empty_from": log.mask.empty_from,
        "not_finite": sum(value is None for series in every for value in series.values),
        "max_grad_norm": max((v for v in log.scalars["grad_norm"].values if v is not None), default=None),
        "validation": {name: series.values[-1] for name, series in log.validation.items()},
        "traces": {name: to_jsonable(series) for name, series in traces.items()},
        "command": command,
        "machine": asdict(this_machine()),
    }


def main() -> int:
    """Trains, records; 1 if the training failed or a logged value is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=WRAPPERS, default="bf16", help="fp16 needs a GPU (default: bf16)")
    parser.add_argument("--iterations", type=int, default=2000, help="default: 2000")
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/stability/PRECISION")
    parser.add_argument("--out", type=Path, help="default: results/stability/PRECISION.json")
    args = parser.parse_args()
    from castling_det.files import write_json

    if args.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            print("error: --precision fp16 needs a GPU: MMEngine scales losses there only", file=sys.stderr)
            return 1
    work_dir = args.work_dir or Path("work_dirs", "stability", args.precision)
    out = args.out or ROOT / "results" / "stability" / f"{args.precision}.json"
    code = subprocess.run(train_command(work_dir, precision=args.precision, iterations=args.iterations)).returncode
    if code != 0:
        print(f"error: the training ended with exit code {code}; its log is in {work_dir}", file=sys.stderr)
        return 1
    command = f"python tools/stability.py --precision {args.precision} --iterations {args.iterations}"
    found = record(work_dir, precision=args.precision, command=command)
    write_json(out, found)
    print(json.dumps({key: value for key, value in found.items() if key != "traces"}, indent=2))
    return int(bool(found["not_finite"]))


if __name__ == "__main__":
    sys.exit(main())
