"""Uptraining on the tree crowns: trained softmax detectors become linear ones in a quarter of their iterations.

The softmax detectors come from `make study` (or tools/demo.py with --seeds), the data from
tools/dataset_converters/tree_crowns.py. Goes on where it was interrupted, a training from its beginning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/uptraining"), help="where to write")
    parser.add_argument("--data-root", type=Path, default=Path("data/tree_crowns"), help="where the data was prepared")
    parser.add_argument(
        "--teachers",
        default="work_dirs/study/seed{seed}/softmax",
        help="work dir of the softmax training of a seed, with its test in test/ (default: %(default)s)",
    )
    parser.add_argument("--distill", action="store_true", help="learn from the frozen softmax detector as well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each (default: 0 1 2)")
    parser.add_argument("--max-iters", type=int, help="iterations of each training, instead of the config's")
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once, sharing the cores (default: 2)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the training's config")
    return parser.parse_args()


def main() -> int:
    """Runs the experiment; 0 when every step succeeded."""
    args = parse_args()
    from castling_det.experiments import StepFailed, Uptraining, run_steps, uptraining_steps

    annotations = args.data_root / "annotations" / "val.json"
    if not annotations.is_file():
        prepare = f"tools/dataset_converters/tree_crowns.py --root {args.data_root}"
        print(f"error: {annotations} is missing; run {prepare}", file=sys.stderr)
        return 1
    plan = Uptraining(
        work_dir=args.work_dir,
        configs=ROOT / "configs" / "castling_vit",
        tools=ROOT / "tools",
        prefix="gfl_castling-vit-nano",
        suffix="tree-crowns",
        teachers=args.teachers,
        annotations=annotations,
        images=args.data_root / "val",
        distill=args.distill,
        max_iters=args.max_iters,
        options=args.option,
        seeds=args.seeds,
    )
    try:
        run_steps(uptraining_steps(plan), jobs=args.jobs)
    except (StepFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.work_dir / "report" / "report.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
