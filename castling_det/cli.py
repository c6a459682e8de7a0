"""The command `castling-det`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from castling_det import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code."""
    parser = argparse.ArgumentParser(prog="castling-det", description=__doc__)
    parser.add_argument("--version", action="version", version=f"castling-det {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="print what is installed, what works and what to do")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    build = commands.add_parser("build", help="compile the optional CPU kernel of linear attention (needs g++)")
    build.add_argument("--remove", action="store_true", help="delete it: the plain operations are taken again")
    arguments = parser.parse_args(argv)
    if arguments.command == "build":
        return _build(remove=arguments.remove)

    from castling_det.doctor import run_doctor

    return run_doctor(as_json=arguments.json)


def _build(*, remove: bool) -> int:
    from castling_det.ops import native

    if remove:
        path = native.library_path()
        print(f"removed {path}" if path.is_file() else "nothing to remove: the kernel is not built")
        path.unlink(missing_ok=True)
        return 0
    try:
        print(f"the kernel is {native.build()}; linear attention on the CPU takes it from now on")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
