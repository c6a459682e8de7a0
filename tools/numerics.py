"""Errors of the attention in float32, bfloat16 and float16 against float64, on the inputs that break formulas.

Writes the record to --out and prints a table. Exit code 1 if a NaN or an infinity was found.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from castling_det.analysis.numerics import measure_numerics, numerics_markdown, write_numerics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON record")
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 1024, 4096, 16384], help="lengths N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1:
        print(f"error: --tokens {min(arguments.tokens)}: expected at least 1", file=sys.stderr)
        return 1
    with Console(stderr=True).status("numerics") as status:
        report = measure_numerics(
            tokens=arguments.tokens,
            dtypes=[DTYPES[name] for name in arguments.dtypes],
            created_by=shlex.join(["tools/numerics.py", *sys.argv[1:]]),
            device=arguments.device,
            progress=status.update,
        )
    write_numerics(arguments.out, report)
    print(numerics_markdown(report))
    return 0 if all(row.finite for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
