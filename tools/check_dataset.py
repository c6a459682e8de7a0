"""Checks data before a training, from a config or a COCO file: everything that is wrong at once, with the fix.

Exit code: 0 if a training can start (there may be warnings), 1 for errors, 2 for a wrong argument.

  tools/check_dataset.py configs/castling_vit/gfl_castling-vit-nano_castling_tree-crowns.py
  tools/check_dataset.py data/mine/train.json --images data/mine/images --classes helmet vest
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="config (.py) or COCO annotation file (.json)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of a COCO file's images")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names that a COCO file is expected to have")
    parser.add_argument(
        "--level",
        choices=("names", "headers", "pixels"),
        default="headers",
        help="of the images: are they there, their sizes and formats too, or every pixel (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the problems; returns the exit code."""
    args = parse_args(arguments)
    from castling_det.datasets.config_checks import check_dataset

    try:
        problems = check_dataset(args.source, classes=args.classes, image_root=args.images, level=args.level)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    errors = sum(problem.severity == "error" for problem in problems)
    print(f"{args.source}: {errors} errors, {len(problems) - errors} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
