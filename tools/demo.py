"""The whole job on the tree crowns: two trainings, conversion, evaluation, report. Goes on where it was interrupted.

The data comes from tools/dataset_converters/tree_crowns.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="where everything is written")
    parser.add_argument("--data-root", type=Path, default=Path("data/tree_crowns"), help="where the data was prepared")
    parser.add_argument(
        "--model",
        default="castling_vit/gfl_castling-vit-nano",
        help="folder and beginning of the names of four configs MODEL_{softmax,castling,linear,deploy}_tree-crowns.py "
        "under configs/, such as castling_levit/picodet_castling-levit-128s (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one pair of trainings for each (default: 0)")
    parser.add_argument("--max-iters", type=int, help="iterations of each training, instead of the config's")
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once, sharing the cores (default: 2)")
    return parser.parse_args()


def _data_is_sound(*configs: Path) -> bool:
    """Whether the trainings can start; prints what keeps them from it."""
    from castling_det.datasets.check_dataset import check_dataset

    problems = dict.fromkeys(problem for config in configs for problem in check_dataset(config))
    errors = [problem for problem in problems if problem.severity == "error"]
    for problem in errors:
        print(problem, file=sys.stderr)
    return not errors


def main() -> int:
    """Runs the experiment; 0 when every step succeeded."""
    args = parse_args()
    from castling_det.experiments import Comparison, StepFailed, comparison_steps, run_steps

    annotations = args.data_root / "annotations" / "val.json"
    if not annotations.is_file():
        prepare = f"tools/dataset_converters/tree_crowns.py --root {args.data_root}"
        print(f"error: {annotations} is missing; run {prepare}", file=sys.stderr)
        return 1
    family, _, prefix = args.model.rpartition("/")
    config = ROOT / "configs" / family / f"{prefix}_softmax_tree-crowns.py"
    if not config.is_file():
        print(f"error: --model {args.model}: {config} is missing", file=sys.stderr)
        return 1
    if not _data_is_sound(config, config.with_name(f"{prefix}_castling_tree-crowns.py")):
        return 1
    plan = Comparison(
        work_dir=args.work_dir,
        configs=config.parent,
        tools=ROOT / "tools",
        prefix=prefix,
        suffix="tree-crowns",
        train_annotations=annotations.with_name("train.json"),
        annotations=annotations,
        images=args.data_root / "val",
        max_iters=args.max_iters,
        seeds=args.seeds,
    )
    try:
        run_steps(comparison_steps(plan), jobs=args.jobs)
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.work_dir / "report" / "report.md").read_text(encoding="utf-8"))
    print(f"The page with plots and pictures: {args.work_dir / 'report' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
