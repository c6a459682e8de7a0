"""mAP of exported files beside PyTorch's: `tools/compare_exports.py CONFIG CHECKPOINT FILE.onnx ... --out FOLDER`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Evaluates a checkpoint with PyTorch and ONNX files made of it with onnxruntime on the config's "
        "test data. Exit code 1 where mAP differs by more than 0.001 (float32) or 0.005 (float16).",
    )
    parser.add_argument("config", help="deploy config")
    parser.add_argument("checkpoint", help="the checkpoint that the files were exported from")
    parser.add_argument("files", nargs="+", help="ONNX files of tools/export_onnx.py")
    parser.add_argument("--out", type=Path, help="folder for accuracy.json and accuracy.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares; 0 where all files are as good as PyTorch, else 1."""
    args = parse_args(arguments)
    from castling_det.export.evaluation import compare_files

    command = shlex.join(sys.argv if arguments is None else ["tools/compare_exports.py", *arguments])
    try:
        report = compare_files(args.config, args.checkpoint, args.files, command=f"python {command}")
        if args.out:
            report.write(args.out)
    except (ValueError, OSError) as error:
        print(f"compare_exports: {error}", file=sys.stderr)
        return 1
    print(report.markdown())
    problems = report.problems()
    for problem in problems:
        print(f"compare_exports: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
