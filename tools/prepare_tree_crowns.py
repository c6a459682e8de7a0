"""Prepares the embedded tree-crown data: gets the pinned wheel, tiles its images, writes COCO JSON."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from castling_det.datasets.tree_crowns import PreparationError, PreparationSummary, prepare


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data/tree_crowns", help="folder to fill (default: %(default)s)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--train-stride", type=int, metavar="PIXELS", help="default: half a tile")
    parser.add_argument(
        "--min-visible",
        type=float,
        default=0.4,
        metavar="FRACTION",
        help="of its area a box must show in a tile to count there (default: %(default)s)",
    )
    parser.add_argument("--wheel", metavar="FILE", help="a copy of the wheel, instead of downloading it")
    return parser.parse_args()


def print_summary(console: Console, summary: PreparationSummary, root: str) -> None:
    table = Table(title=f"Tree crowns in {root}" + (" (already complete)" if summary.reused else ""))
    table.add_column("split")
    for name in ("trees", "tiles", "without a box", "boxes", "ignored parts", "clipped", "dropped"):
        table.add_column(name, justify="right")
    for split in summary.splits:
        dropped = sum(source.dropped_empty + source.dropped_duplicate for source in split.sources)
        counts = (
            sum(source.boxes for source in split.sources),
            split.tiles,
            split.tiles_without_boxes,
            split.boxes,
            split.ignored,
            sum(source.clipped for source in split.sources),
            dropped,
        )
        table.add_row(split.split, *map(str, counts))
    console.print(table)
    for split in summary.splits:
        if split.never_counted:
            console.print(f"{split.split}: {split.never_counted} trees are a target in no tile.")


def main() -> int:
    arguments = parse_arguments()
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("source", total=None)
            summary = prepare(
                arguments.root,
                tile_size=arguments.tile_size,
                train_stride=arguments.train_stride,
                min_visible=arguments.min_visible,
                wheel=arguments.wheel,
                progress=lambda done, total: bar.update(task, description="tiles", completed=done, total=total),
            )
    except (PreparationError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_summary(Console(), summary, arguments.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
