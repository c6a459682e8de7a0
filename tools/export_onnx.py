"""Exports a detector to ONNX: `tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Exports a detector with linear attention, or a softmax baseline to compare it with, to one ONNX "
        "file with dynamic batch, height and width, and compares it with PyTorch at three sizes before it takes its "
        "name. docs/deployment.md has the format.",
    )
    parser.add_argument("config", help="deploy config, attention='linear'; or that of a softmax training")
    parser.add_argument("checkpoint", help="checkpoint that tools/convert.py wrote, or of a linear or softmax training")
    parser.add_argument("out", help="file to write, .onnx")
    parser.add_argument(
        "--no-preprocessing", action="store_true", help="take normalised images; default: as OpenCV reads them"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of weights and features; int8: linear layers quantised dynamically, the rest float32",
    )
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
        from castling_det.export.onnx import export_onnx

        report = export_onnx(
            args.config,
            args.checkpoint,
            args.out,
            raw=args.raw,
            preprocessing=not args.no_preprocessing,
            precision=args.precision,
            opset=args.opset,
            shapes=[_shape(text) for text in args.shapes] if args.shapes else None,
        )
    except ImportError as error:
        extras = "export" if (error.name or "").startswith("onnx") else "onedl,export"
        print(f"export_onnx: {error}; pip install 'castling-det[{extras}]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        # An OSError of ours has its sentence in `strerror`, the system's has the file beside it.
        said = error.strerror if isinstance(error, OSError) and not error.filename else error
        print(f"export_onnx: {said}", file=sys.stderr)
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
