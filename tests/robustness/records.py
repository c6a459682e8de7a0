"""Records of the fuzz and of the kills, and their tables in docs/robustness.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from castling_det.report.records import Machine, read_document, write_document
from castling_det.report.render import markdown_table

_SCHEMA = "castling_det.robustness/1"


@dataclass(frozen=True)
class Target:
    """What was done to one reader, or to one command."""

    name: str
    counts: dict[str, int]
    """How often each outcome came, by the name of its column."""
    failures: tuple[str, ...]
    """What may not happen: the number of the case, and what it was."""
    most: dict[str, float] = field(default_factory=dict)
    """What the worst case needed, by the name of its column."""


@dataclass(frozen=True)
class Trials:
    """One run over all targets."""

    command: str
    seed: int
    seconds: float
    machine: Machine
    targets: tuple[Target, ...]


def write_trials(path: Path, trials: Trials) -> None:
    """Writes the record as JSON."""
    write_document(path, trials, schema=_SCHEMA, field="report")


def read_trials(path: Path) -> Trials:
    """Reads what `write_trials` wrote; raises ValueError for anything else."""
    fix = "run `make fuzz` or `make crash-test` again"
    return read_document(path, Trials, schema=_SCHEMA, field="report", fix=fix)


def trials_markdown(trials: Trials) -> str:
    """The table of a record with its totals, the command and the machine."""
    targets = trials.targets
    counts, most = targets[0].counts, targets[0].most
    rows: list[list[str | int]] = [
        [t.name, *t.counts.values(), len(t.failures), *(f"{value:g}" for value in t.most.values())] for t in targets
    ]
    totals = [sum(column) for column in zip(*(row[1 : 2 + len(counts)] for row in rows), strict=True)]
    rows.append(["all", *totals, *(f"{max(t.most[name] for t in targets):g}" for name in most)])
    table = markdown_table(["target", *counts, "failures", *most], [list(map(str, row)) for row in rows])
    note = f"`{trials.command}`, {trials.seconds / 60:.0f} minutes."
    return "\n".join([*table, "", note, "", f"Machine: {trials.machine}.", ""])
