"""Exports a linear detector for torch alone: `tools/export_pt2.py CONFIG CHECKPOINT OUT.pt2 --kind program|aoti`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from castling_det.export.command_line import add_export_arguments, refusal


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Exports a detector with linear attention as a program of torch.export or as a package that "
        "AOTInductor has compiled, with dynamic batch, height and width, and compares it with PyTorch at three sizes "
        "before it takes its name.",
    )
    add_export_arguments(parser, suffix=".pt2", precisions=("float32", "float16"))
    parser.add_argument(
        "--kind",
        choices=("program", "aoti"),
        default="program",
        help="program: torch.export's, for any device; aoti: compiled for this machine's CPU, needs a C++ compiler",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; 0 on success, 1 with one line on stderr on any refusal."""
    args = parse_args(arguments)
    try:
        from castling_det.export.package import export_package

        report = export_package(
            args.config,
            args.checkpoint,
            args.out,
            kind=args.kind,
            preprocessing=not args.no_preprocessing,
            precision=args.precision,
            allow_head_softmax=args.allow_head_softmax,
        )
    except (ImportError, ValueError, OSError) as error:
        print(f"export_pt2: {refusal(error)}", file=sys.stderr)
        return 1
    print(report.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
