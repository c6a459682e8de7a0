"""Prints parameters and multiply-adds (MACs) of a config's detector, in closed form. Needs no data and no weights."""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from castling_det.config import load_config
from castling_det.report.complexity import detector_complexity
from castling_det.report.complexity_text import complexity_table, write_complexity


def main() -> int:
    """Returns the exit code: 0, or 1 after an error on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file, or a package's own: mmdet::gfl/gfl_r50_fpn_1x_coco.py")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        required=True,
        metavar=("H", "W"),
        help="height and width of the image in pixels",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the record, with a row a module, as JSON")
    parser.add_argument("--modules", action="store_true", help="print a row for each module")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that override the config's",
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.cfg_options)
        complexity = detector_complexity(config, tuple(arguments.shape), name=arguments.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(complexity_table(complexity, by_module=arguments.modules))
    if arguments.json:
        write_complexity(arguments.json, complexity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
