"""What the exporting commands share: their arguments, and one line for a refusal."""

from __future__ import annotations

import argparse

__all__ = ["add_export_arguments", "refusal"]


def add_export_arguments(parser: argparse.ArgumentParser, *, suffix: str, precisions: tuple[str, ...]) -> None:
    """Adds config, checkpoint, out, --no-preprocessing, --precision and --allow-head-softmax.

    Args:
        parser: gets the arguments.
        suffix: of the file to write, for the help.
        precisions: choices of `--precision`, the first one its default.
    """
    parser.add_argument("config", help="deploy config, attention='linear'")
    parser.add_argument("checkpoint", help="checkpoint that tools/convert.py wrote, or of a linear training")
    parser.add_argument("out", help=f"file to write, {suffix}")
    parser.add_argument(
        "--no-preprocessing", action="store_true", help="take normalised images; default: as OpenCV reads them"
    )
    quantised = "; int8: linear layers quantised dynamically, the rest float32" if "int8" in precisions else ""
    parser.add_argument(
        "--precision", choices=precisions, default=precisions[0], help=f"of weights and features{quantised}"
    )
    parser.add_argument(
        "--allow-head-softmax",
        action="store_true",
        help="accept the softmax attention of a transformer head (DINO) over its own queries",
    )


def refusal(error: Exception) -> str:
    """One line for a user.

    An OSError of ours has its sentence in `strerror`, the system's its file beside it.
    """
    if isinstance(error, ImportError):
        return f"{error}; pip install 'castling-det[export]'"
    if isinstance(error, OSError) and not error.filename:
        return str(error.strerror)
    return str(error)
