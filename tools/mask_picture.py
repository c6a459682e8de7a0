"""Draws how the mask vanishes: the schedules, and what a recorded training kept in each layer.

  tools/mask_picture.py results/tree_crowns/report.json castling docs/images/masks.png
      --start 1 --end 576 --begin 0.4 --empty-from 0.7
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Returns the exit code: 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of tools/report.py")
    parser.add_argument("run", help="name of a castling run in it; its first seed is drawn")
    parser.add_argument("out", type=Path, help="picture to write, .png")
    parser.add_argument("--start", type=float, default=1.0, help="threshold at the beginning (1)")
    parser.add_argument("--end", type=float, required=True, help="threshold that the ramps reach")
    parser.add_argument("--begin", type=float, default=0.0, help="progress up to which the threshold is held (0)")
    parser.add_argument("--empty-from", type=float, required=True, help="progress from which on the mask is empty")
    args = parser.parse_args()
    from castling_det.analysis.mask_picture import mask_picture
    from castling_det.files import atomic_write
    from castling_det.report.records import read_report

    try:
        runs = read_report(args.report).runs
        run = next((run for run in runs if run.name == args.run), None)
        if run is None:
            names = ", ".join(dict.fromkeys(each.name for each in runs))
            raise ValueError(f"run {args.run!r}: expected one of {names}")
        picture = mask_picture(run, start=args.start, end=args.end, begin=args.begin, empty_from=args.empty_from)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with atomic_write(args.out) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
