"""A report as Markdown: to print, to paste into a README, to read in a pull request."""

from __future__ import annotations

import textwrap

from castling_det.report.markdown_table import markdown_table, one_line
from castling_det.report.record import METRICS, Report, RunRecord
from castling_det.report.table import (
    duration,
    failures,
    headline_cells,
    headline_columns,
    interval_note,
    latency_note,
    machine_line,
    notes,
    summaries,
)

__all__ = ["headline", "markdown"]


def headline(report: Report, *, brief: bool = True) -> str:
    """The table with its units and the machine, without headings: to stand in another document."""
    body = [headline_cells(report, summary, brief=brief) for summary in summaries(report)]
    table = markdown_table(headline_columns(report, brief=brief), body)
    explained = (
        "mAP in [0, 1]; ± is the sample standard deviation over seeds. GMACs are 10^9 multiply-adds of one image."
    )
    text = " ".join(filter(None, (explained, interval_note(report), latency_note(report))))
    return "\n".join([*table, "", *textwrap.wrap(text, 128), "", machine_line(report)]) + "\n"


def markdown(report: Report) -> str:
    """The table, failed runs, every single run, how it was made."""
    lines = [f"# {report.deployed} against {report.baseline}", "", one_line(f"Data: {report.dataset}."), ""]
    lines += [headline(report, brief=False).rstrip()]
    lines += [text for note in notes(report) for text in ("", f"Note: {one_line(note)}")]
    if report.failed:
        lines += ["", "## Failed", "", *(f"- {one_line(line)}" for line in failures(report))]
    columns = ("run", "seed", "status", *METRICS, "iterations", "training", "checkpoint sha256")
    lines += ["", "## Every run", "", *markdown_table(columns, [_run_cells(run) for run in report.runs])]
    commands = dict.fromkeys(command for run in report.runs for command in run.commands)
    lines += ["", "## How it was made", "", f"- `{one_line(report.created_by)}`, {report.created_at}"]
    lines += [f"- `{one_line(command)}`" for command in commands]
    return "\n".join(lines) + "\n"


def _run_cells(run: RunRecord) -> tuple[str, ...]:
    values = [run.metrics.get(name) for name in METRICS]
    return (
        run.name,
        "-" if run.seed is None else str(run.seed),
        run.status if run.ok else "FAILED",
        *("-" if value is None else f"{value:.3f}" for value in values),
        "-" if run.iterations is None else str(run.iterations),
        "-" if run.train_seconds is None else duration(run.train_seconds),
        run.checkpoint_sha256[:12] if run.checkpoint_sha256 else "-",
    )
