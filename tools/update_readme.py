"""Writes the tables of README.md from the records under results/."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECORD = ROOT / "results" / "tree_crowns" / "report.json"
BLOCK = re.compile(r"(<!-- begin table: python tools/update_readme\.py -->\n).*?(<!-- end table -->)", re.DOTALL)


def updated(text: str) -> str:
    """The README with its table made anew."""
    from castling_det.analysis.record import read_report
    from castling_det.analysis.report import headline

    if not BLOCK.search(text):
        raise ValueError(f"{README}: the markers of the table are missing")
    table = headline(read_report(RECORD))
    return BLOCK.sub(lambda found: f"{found[1]}{table.strip()}\n{found[2]}", text)


def main() -> int:
    """Rewrites the README, or with --check only says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    args = parser.parse_args()
    from castling_det.files import write_text

    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if args.check:
        return int(text != new)
    write_text(README, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
