"""Detects in images, a folder, a glob or a video: `tools/detect.py [MODEL] SOURCE --out FOLDER`.

MODEL is an ONNX file of tools/export_onnx.py, which needs neither PyTorch nor MMDetection, a checkpoint with --config,
or a detector that comes with the package: scores-nano, which finds the symbols of engraved music, where none is named.

Exit codes: 0; 1 for an error, which leaves no file half written; 10 + n when n images or frames were skipped because
they cannot be read (110 for 100 or more).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_MODEL = "scores-nano"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [MODEL] SOURCE [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="SOURCE",
        help="image, folder, glob in quotes or video (castling-det[video]); after the model, if that is named",
    )
    parser.add_argument("--config", help="config of a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("detections"), help="folder to write (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images or tiles at once (1)")
    parser.add_argument("--score-thr", type=float, default=0.0, metavar="S", help="leave out detections below it")
    parser.add_argument("--draw-thr", type=float, default=0.3, metavar="S", help="draw those from it on (%(default)s)")
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="take larger images in square tiles of this side, through SAHI"
    )
    parser.add_argument("--overlap", type=float, default=0.2, help="of neighbouring tiles, in [0, 1) (%(default)s)")
    parser.add_argument("--ann", type=Path, help="COCO file whose image and category ids the predictions take")
    parser.add_argument("--no-draw", action="store_true", help="write predictions only, no pictures or video")
    parser.add_argument("--max-frames", type=int, metavar="N", help="of a video")
    parser.add_argument(
        "--max-pixels", type=int, default=100_000_000, metavar="N", help="height x width of the largest image (1e8)"
    )
    args = parser.parse_intermixed_args(arguments)
    if len(args.paths) > 2:
        parser.error(f"expected [MODEL] SOURCE, got {len(args.paths)} paths; put a glob in quotes")
    args.model, args.source = [DEFAULT_MODEL, *args.paths][-2:]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Detects; see the exit codes above."""
    args = parse_args(arguments)
    try:
        from castling_det.runtime.detector import Detector
        from castling_det.runtime.run import detect_source
        from castling_det.runtime.sources import open_source
    except ImportError as error:
        print(f"detect: {error}; pip install 'castling-det[runtime]'", file=sys.stderr)
        return 1
    try:
        # The source first: a missing folder is said before a model is loaded.
        source = open_source(args.source, max_frames=args.max_frames, max_pixels=args.max_pixels)
        detector = Detector(
            args.model,
            args.config,
            device=args.device,
            score_thr=args.score_thr,
            batch_size=args.batch_size,
            tile=args.tile,
            overlap=args.overlap,
            max_pixels=args.max_pixels,
        )
        options = {"draw": not args.no_draw, "draw_thr": args.draw_thr, "annotations": args.ann}
        outcome = detect_source(detector, source, args.out, **options)
    except ValueError as error:
        print(f"detect: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"detect: {error.filename or args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("detect: interrupted", file=sys.stderr)
        return 130
    skipped = f", {outcome.skipped} skipped" if outcome.skipped else ""
    written = f"; {args.out / 'predictions.json'}" if outcome.images else ""
    print(f"{outcome.detections} detections in {outcome.images} images{skipped}{written}")
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
