"""Records of the fuzz and of the kills, and their tables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from castling_det.analysis.benchmark import machine_line
from castling_det.report.records import Machine, read_document, write_document
from castling_det.report.render import markdown_table

__all__ = [
    "CrashReport",
    "CrashTarget",
    "FuzzReport",
    "FuzzTarget",
    "crash_markdown",
    "fuzz_markdown",
    "read_crashes",
    "read_fuzz",
    "write_crashes",
    "write_fuzz",
]

_FUZZ_SCHEMA = "castling_det.fuzz/1"
_CRASH_SCHEMA = "castling_det.crashes/1"


@dataclass(frozen=True)
class FuzzTarget:
    """One reader, fed with mutations of valid files."""

    name: str
    cases: int
    read: int
    """Files that were still valid."""
    refused: int
    """Files that were refused with a ValueError or OSError that names the file or the field."""
    failures: tuple[str, ...]
    """Anything else: the case's number, and what happened."""


@dataclass(frozen=True)
class FuzzReport:
    """One run of the fuzz; `seconds` of processor time."""

    command: str
    seed: int
    seconds: float
    machine: Machine
    targets: tuple[FuzzTarget, ...]


@dataclass(frozen=True)
class CrashTarget:
    """One command, killed with SIGKILL at random moments and started again."""

    name: str
    kills: int
    """Runs that were killed before they ended."""
    finished: int
    """Of those, how many a restart brought to their end."""
    equal: int
    """Of those, how many left the same result as a run that nobody disturbed."""
    leftovers: int
    """Temporary files that kills left behind, never read as results."""
    bad: tuple[str, ...]
    """A truncated file that was found under its final name, or another result: the kill's number, and what."""


@dataclass(frozen=True)
class CrashReport:
    """One run of the kills; `seconds` on the clock."""

    command: str
    seed: int
    seconds: float
    machine: Machine
    targets: tuple[CrashTarget, ...]


def write_fuzz(path: str | os.PathLike[str], report: FuzzReport) -> None:
    """Writes the record as JSON."""
    write_document(path, report, schema=_FUZZ_SCHEMA, field="report")


def read_fuzz(path: str | os.PathLike[str]) -> FuzzReport:
    """Reads what `write_fuzz` wrote; raises ValueError for anything else."""
    return read_document(path, FuzzReport, schema=_FUZZ_SCHEMA, field="report", fix="run `make fuzz` again")


def write_crashes(path: str | os.PathLike[str], report: CrashReport) -> None:
    """Writes the record as JSON."""
    write_document(path, report, schema=_CRASH_SCHEMA, field="report")


def read_crashes(path: str | os.PathLike[str]) -> CrashReport:
    """Reads what `write_crashes` wrote; raises ValueError for anything else."""
    return read_document(path, CrashReport, schema=_CRASH_SCHEMA, field="report", fix="run `make crash-test` again")


def fuzz_markdown(report: FuzzReport) -> str:
    """The table of a fuzz, with the command and the machine."""
    rows = [
        [target.name, *map(str, (target.cases, target.read, target.refused, len(target.failures)))]
        for target in report.targets
    ]
    total = [sum(getattr(target, name) for target in report.targets) for name in ("cases", "read", "refused")]
    failures = sum(len(target.failures) for target in report.targets)
    rows.append(["all", *map(str, (*total, failures))])
    head = ["reader", "cases", "still valid", "refused by name", "anything else"]
    note = f"`{report.command}`, {report.seconds:.0f} seconds of one core."
    return "\n".join([*markdown_table(head, rows), "", note, "", machine_line(report.machine), ""])


def crash_markdown(report: CrashReport) -> str:
    """The table of the kills, with the command and the machine."""
    names = ("kills", "finished", "equal", "leftovers")
    rows = [
        [target.name, *(str(getattr(target, name)) for name in names), str(len(target.bad))]
        for target in report.targets
    ]
    total = [str(sum(getattr(target, name) for target in report.targets)) for name in names]
    rows.append(["all", *total, str(sum(len(target.bad) for target in report.targets))])
    head = ["command", "kills", "finished after it", "same result", "temporary files left", "bad files"]
    note = f"`{report.command}`, {report.seconds / 60:.0f} minutes."
    return "\n".join([*markdown_table(head, rows), "", note, "", machine_line(report.machine), ""])
