"""Exports a linear detector to ONNX: `tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from castling_det.export.command_line import add_export_arguments, refusal


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Exports a detector with linear attention to one ONNX file with dynamic batch, height and width, "
        "and compares it with PyTorch at three sizes before it takes its name. docs/deployment.md has the format.",
    )
    add_export_arguments(parser, suffix=".onnx", precisions=("float32", "float16", "int8"))
    parser.add_argument("--raw", action="store_true", help="the head's own outputs instead of boxes, scores, labels")
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="of ONNX's default domain (20)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="BxHxW",
        help="batch, height and width to compare at, three or more; default: three multiples of the padding",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; 0 on success, 1 with one line on stderr on any refusal."""
    args = parse_args(arguments)
    try:
        from castling_det.export.export import export_onnx

        report = export_onnx(
            args.config,
            args.checkpoint,
            args.out,
            raw=args.raw,
            preprocessing=not args.no_preprocessing,
            precision=args.precision,
            opset=args.opset,
            shapes=[_shape(text) for text in args.shapes] if args.shapes else None,
            allow_head_softmax=args.allow_head_softmax,
        )
    except (ImportError, ValueError, OSError) as error:
        print(f"export_onnx: {refusal(error)}", file=sys.stderr)
        return 1
    print(report.summary())
    return 0


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--shapes {text}: expected batch, height and width, such as 1x640x480")
    return int(parts[0]), int(parts[1]), int(parts[2])


if __name__ == "__main__":
    sys.exit(main())
