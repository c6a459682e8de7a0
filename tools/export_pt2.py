"""Exports a linear detector for torch alone: `tools/export_pt2.py CONFIG CHECKPOINT OUT.pt2 --kind program|aoti`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Exports a detector with linear attention as a program of torch.export or as a package that "
        "AOTInductor has compiled, with dynamic batch, height and width, and compares it with PyTorch at three sizes "
        "before it takes its name.",
    )
    parser.add_argument("config", help="deploy config, attention='linear'")
    parser.add_argument("checkpoint", help="checkpoint that tools/convert.py wrote, or of a linear training")
    parser.add_argument("out", help="file to write, .pt2")
    parser.add_argument(
        "--kind",
        choices=("program", "aoti"),
        default="program",
        help="program: torch.export's, for any device; aoti: compiled for this machine's CPU, needs a C++ compiler",
    )
    parser.add_argument("--no-preprocessing", action="store_true", help="take normalised images")
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32")
    parser.add_argument(
        "--allow-head-softmax",
        action="store_true",
        help="accept the softmax attention of a transformer head (DINO) over its own queries",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; 0 on success, 1 with one line on stderr on any refusal."""
    args = parse_args(arguments)
    from castling_det.deployment.package import export_package

    try:
        report = export_package(
            args.config,
            args.checkpoint,
            args.out,
            kind=args.kind,
            preprocessing=not args.no_preprocessing,
            precision=args.precision,
            allow_head_softmax=args.allow_head_softmax,
        )
    except ValueError as error:
        print(f"export_pt2: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Ours have their sentence in strerror, the system's the file beside it.
        print(f"export_pt2: {error if error.filename else error.strerror}", file=sys.stderr)
        return 1
    print(report.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
