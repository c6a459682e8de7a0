"""The command `castling-det`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from castling_det import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="castling-det", description=__doc__)
    parser.add_argument("--version", action="version", version=f"castling-det {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="print what is installed, what works and what to do")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)

    from castling_det.doctor import run_doctor

    return run_doctor(as_json=arguments.json)
