"""Draws where an attention layer looks: softmax, linear-angular weights and mask of chosen tokens over an image.

The weights are exact, though linear attention never forms them. Any detector with a backbone of castling_det will do,
and any checkpoint that fits the config.

  tools/attention.py configs/castling_vit/gfl_castling-vit-nano_deploy_tree-crowns.py
      work_dirs/demo/seed0/deploy/deploy.pth IMAGE.png --point 120 80 --out attention.png

Exit code: 0, or 1 with one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of the detector")
    parser.add_argument("checkpoint", type=Path, help="its weights, .pth")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="picture to write; its caption is inside it")
    parser.add_argument("--layer", metavar="NAME", help="such as blocks.3 (default: the last); --list prints them")
    parser.add_argument("--list", action="store_true", help="print the names of the layers, and draw nothing")
    parser.add_argument(
        "--point",
        nargs=2,
        type=float,
        action="append",
        metavar=("X", "Y"),
        dest="points",
        help="pixel of the image file whose token asks; once for each row (default: the middle)",
    )
    parser.add_argument("--head", type=int, metavar="N", help="one head (default: the mean over the heads)")
    parser.add_argument(
        "--threshold",
        nargs="+",
        type=float,
        default=[],
        metavar="T",
        help="a mask for each, in the unit of the config's threshold_unit (default: the config's threshold)",
    )
    return parser.parse_args(arguments)


def load_detector(config: str | Path, checkpoint: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The config, its detector with the weights of the checkpoint in eval mode, and the checkpoint's meta.

    Raises:
        ValueError: config or checkpoint that cannot be read, or that do not belong together.
    """
    from castling_det.config import load_config
    from castling_det.conversion import load_checkpoint
    from castling_det.conversion.detectors import build_detector, load_weights

    loaded = load_config(config)
    model, content = build_detector(loaded), load_checkpoint(checkpoint)
    load_weights(model, content, checkpoint)
    return loaded, model, content.get("meta") or {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(arguments)
    from castling_det.layers import attention_layers
    from castling_det.report.attention_maps import attention_picture, capture

    if args.out is None and not args.list:
        print("error: --out: expected a file to write, or --list", file=sys.stderr)
        return 1
    try:
        config, model, meta = load_detector(args.config, args.checkpoint)
        if args.list:
            print("\n".join(attention_layers(model)))
            return 0
        captured = capture(config, model, args.image, args.layer, meta)
        middle = (captured.image.width / 2, captured.image.height / 2)
        points = [(x, y) for x, y in args.points or [middle]]
        picture = attention_picture(captured, points, head=args.head, thresholds=args.threshold)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    picture.save(args.out)
    print(picture.caption)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
