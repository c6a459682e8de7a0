"""Counts parameters and multiply-adds of every COCO model under configs/ and writes results/model_zoo.json.

The table of docs/model_zoo.md is made from it by tools/dev/tables.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from castling_det.analysis.model_zoo import measure_zoo, write_zoo, zoo_markdown, zoo_models

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "model_zoo.json", help="the JSON record")
    parser.add_argument("--match", default="", help="only models whose config has this in its name")
    arguments = parser.parse_args()
    paths = [path for path in zoo_models(ROOT / "configs") if arguments.match in path.stem]
    if not paths:
        print(f"error: --match {arguments.match}: no COCO config under configs/ has it in its name", file=sys.stderr)
        return 1
    with Console(stderr=True).status("model zoo") as status:
        zoo = measure_zoo(paths, created_by="tools/model_zoo.py", progress=status.update)
    write_zoo(arguments.out, zoo)
    print(zoo_markdown(zoo))
    return 0


if __name__ == "__main__":
    sys.exit(main())
