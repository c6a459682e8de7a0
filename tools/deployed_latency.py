"""Latency of a detector in eager PyTorch, torch.compile, AOTInductor and onnxruntime, linear beside softmax."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from castling_det.export.latency import ATTENTIONS, RUNTIMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a detector's config, of any attention")
    parser.add_argument("--sizes", nargs="+", type=int, default=[320, 640, 1024, 1536], help="sides in pixels")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=2, help="of torch and onnxruntime (2)")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="of each row, beyond three calls (30)")
    parser.add_argument("--out", type=Path, help="folder for latency.json and latency.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; 1 where a row failed or on a refusal."""
    args = parse_args(arguments)
    import torch

    from castling_det.export.latency import measure_latency

    torch.set_num_threads(args.threads)
    command = shlex.join(sys.argv if arguments is None else ["tools/deployed_latency.py", *arguments])
    try:
        report = measure_latency(
            args.config,
            sizes=args.sizes,
            attentions=args.attentions,
            runtimes=args.runtimes,
            max_seconds=args.max_seconds,
            command=f"python {command}",
        )
        if args.out:
            report.write(args.out)
    except (ValueError, OSError) as error:
        print(f"deployed_latency: {error}", file=sys.stderr)
        return 1
    print(report.markdown())
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
