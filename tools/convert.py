"""Converts a hybrid checkpoint to linear attention only: `tools/convert.py CONFIG SOURCE.pth OUT.pth`.

With --from-softmax the other way in: SOURCE is a trained softmax detector, OUT the start of the short castling training
that CONFIG describes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Converts a detector that was trained with castling attention to linear attention only. "
        "Writes OUT and a manifest beside it (OUT with the suffix .json).",
    )
    parser.add_argument("config", help="config of the training (attention='castling'), or its deploy config")
    parser.add_argument("source", help="checkpoint of the training")
    parser.add_argument("out", help="checkpoint to write, .pth, or .safetensors for all but MMEngine's own tools")
    parser.add_argument(
        "--from-softmax",
        action="store_true",
        help="SOURCE is a trained softmax detector and CONFIG a castling training: write the weights that it starts "
        "from (load_from), and how far its first iteration is from the softmax detector",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "online"),
        default="auto",
        help="which weights of a training with EMAHook; auto takes the average where there is one",
    )
    parser.add_argument(
        "--allow-nonempty-mask",
        action="store_true",
        help="convert although the softmax branch is not known to be empty, and report the drift",
    )
    parser.add_argument(
        "--probe-images",
        nargs="+",
        default=[],
        metavar="PATH",
        help="real images or folders of them to measure occupancy and drift on; default: generated noise",
    )
    parser.add_argument("--num-probes", type=int, default=4, metavar="N", help="most images to measure on (4)")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="pixels of generated images; default: the test pipeline's",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; 0 on success, 1 with one line on stderr on any refusal."""
    args = parse_args(arguments)
    from castling_det.conversion import convert, manifest_path, start_from_softmax

    # Not quoted: by castling-det the name is two words.
    name, words = (sys.argv[0], sys.argv[1:]) if arguments is None else ("tools/convert.py", arguments)
    options = dict(
        weights=args.weights,
        probe_images=args.probe_images,
        num_probes=args.num_probes,
        shape=tuple(args.shape) if args.shape else None,
        command=f"{name} {shlex.join(words)}",
    )
    try:
        if args.from_softmax:
            if args.allow_nonempty_mask:
                raise ValueError("--allow-nonempty-mask: has no meaning with --from-softmax; leave it out")
            manifest = start_from_softmax(args.config, args.source, args.out, **options)
        else:
            allowed = args.allow_nonempty_mask
            manifest = convert(args.config, args.source, args.out, allow_nonempty_mask=allowed, **options)
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Ours have their sentence in strerror, the system's the file beside it.
        print(f"convert: {error if error.filename else error.strerror}", file=sys.stderr)
        return 1
    print(manifest.summary())
    print(_multiply_adds(args.config, manifest.probes.shapes[0]))
    print(f"manifest: {manifest_path(args.out)}")
    return 0


def _multiply_adds(config: str, shape: tuple[int, int]) -> str:
    from castling_det.config import load_config
    from castling_det.conversion.detectors import with_attention
    from castling_det.report.complexity import detector_complexity

    counts = []
    for attention in ("linear", "softmax"):
        try:
            complexity = detector_complexity(with_attention(load_config(config), attention), shape)
        except ValueError as error:
            return f"multiply-adds are not known: {error}"
        counts.append(f"{complexity.gmacs:.2f} G with {attention} attention")
    return f"multiply-adds at {shape[0]} x {shape[1]}: {', '.join(counts)}"


if __name__ == "__main__":
    sys.exit(main())
