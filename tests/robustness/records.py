"""Records of the fuzz and of the kills, and their tables in docs/robustness.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castling_det.report.records import Machine, read_document, write_document
from castling_det.report.render import markdown_table
from tools.benchmarks.attention import machine_line

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
    """The number of a kill, and the torn file or the other result that it left."""


@dataclass(frozen=True)
class CrashReport:
    """One run of the kills; `seconds` on the clock."""

    command: str
    seed: int
    seconds: float
    machine: Machine
    targets: tuple[CrashTarget, ...]


def write_fuzz(path: Path, report: FuzzReport) -> None:
    """Writes the record as JSON."""
    write_document(path, report, schema=_FUZZ_SCHEMA, field="report")


def read_fuzz(path: Path) -> FuzzReport:
    """Reads what `write_fuzz` wrote; raises ValueError for anything else."""
    return read_document(path, FuzzReport, schema=_FUZZ_SCHEMA, field="report", fix="run `make fuzz` again")


def write_crashes(path: Path, report: CrashReport) -> None:
    """Writes the record as JSON."""
    write_document(path, report, schema=_CRASH_SCHEMA, field="report")


def read_crashes(path: Path) -> CrashReport:
    """Reads what `write_crashes` wrote; raises ValueError for anything else."""
    return read_document(path, CrashReport, schema=_CRASH_SCHEMA, field="report", fix="run `make crash-test` again")


def fuzz_markdown(report: FuzzReport) -> str:
    """The table of a fuzz, with the command and the machine."""
    counts = [(t.name, [t.cases, t.read, t.refused, len(t.failures)]) for t in report.targets]
    head = ["reader", "cases", "still valid", "refused by name", "anything else"]
    return _table(head, counts, f"`{report.command}`, {report.seconds:.0f} seconds of one core.", report.machine)


def crash_markdown(report: CrashReport) -> str:
    """The table of the kills, with the command and the machine."""
    counts = [(t.name, [t.kills, t.finished, t.equal, t.leftovers, len(t.bad)]) for t in report.targets]
    head = ["command", "kills", "finished after it", "same result", "temporary files left", "bad files"]
    return _table(head, counts, f"`{report.command}`, {report.seconds / 60:.0f} minutes.", report.machine)


def _table(head: list[str], counts: Sequence[tuple[str, list[int]]], note: str, machine: Machine) -> str:
    rows = [*counts, ("all", [sum(column) for column in zip(*(numbers for _, numbers in counts), strict=True)])]
    body = [[name, *map(str, numbers)] for name, numbers in rows]
    return "\n".join([*markdown_table(head, body), "", note, "", machine_line(machine), ""])
