"""The headline table: runs of one name are one row, with the spread over seeds; a failed run is never left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from castling_det.analysis.record import Report, RunRecord, unique

__all__ = [
    "Spread",
    "Summary",
    "duration",
    "failures",
    "headline_cells",
    "headline_columns",
    "latency_note",
    "machine_line",
    "notes",
    "summaries",
]


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for a single value), smallest and largest of `count` values."""

    mean: float
    std: float | None
    low: float
    high: float
    count: int

    def text(self, *, sign: str = "") -> str:
        """`0.312`, or `0.312 ± 0.008` over several; `sign="+"` writes it always."""
        return f"{self.mean:{sign}.3f}" + (f" ± {self.std:.3f}" if self.std is not None else "")

    @property
    def extremes(self) -> str | None:
        """`0.301 to 0.320`; None for a single value."""
        return f"{self.low:.3f} to {self.high:.3f}" if self.count > 1 else None


@dataclass(frozen=True)
class Summary:
    """The runs of one name, and what they give together. `difference` is mAP minus the baseline's, paired by seed."""

    name: str
    runs: tuple[RunRecord, ...]
    metrics: dict[str, Spread]
    difference: Spread | None

    @property
    def first(self) -> RunRecord:
        """The first run that is ok, else the first: what does not depend on the seed is read from it."""
        return next((run for run in self.runs if run.ok), self.runs[0])

    @property
    def seeds(self) -> int:
        """How many runs are ok."""
        return sum(run.ok for run in self.runs)


def summaries(report: Report) -> tuple[Summary, ...]:
    """One summary a name, in the report's order."""
    baseline = [run for run in report.runs_named(report.baseline) if run.ok]
    result = []
    for name in report.names:
        runs = report.runs_named(name)
        good = [run for run in runs if run.ok]
        spreads = {key: _spread(good, key) for key in unique(key for run in good for key in run.metrics)}
        metrics = {key: spread for key, spread in spreads.items() if spread is not None}
        difference = None if name == report.baseline else _difference(good, baseline)
        result.append(Summary(name, runs, metrics, difference))
    return tuple(result)


def headline_columns(report: Report) -> tuple[str, ...]:
    """Titles of the table, units in them. Latency only where a run has one."""
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    at = " at {}x{}".format(*shape) if shape else ""
    columns = ["run", "seeds", "mAP", f"mAP - {report.baseline}", "mAP50", "mAP75", "params (M)", f"GMACs{at}"]
    if any(run.latency is not None for run in report.runs):
        columns.append("latency p50 (ms)")
    return tuple(columns)


def headline_cells(report: Report, summary: Summary) -> tuple[str, ...]:
    """The cells of one row, in the order of `headline_columns`; a dash where there is no number."""
    run = summary.first
    metric = {name: spread.text() for name, spread in summary.metrics.items()}
    difference = summary.difference.text(sign="+") if summary.difference is not None else "-"
    failed = summary.seeds < len(summary.runs)
    cells = [
        summary.name,
        f"{summary.seeds} (FAILED: {len(summary.runs) - summary.seeds})" if failed else str(summary.seeds),
        metric.get("mAP", "-"),
        "baseline" if summary.name == report.baseline else difference,
        metric.get("mAP50", "-"),
        metric.get("mAP75", "-"),
        f"{run.params / 1e6:.2f}" if run.params is not None else "-",
        f"{run.gmacs:.3f}" if run.gmacs is not None else "-",
    ]
    if any(other.latency is not None for other in report.runs):
        cells.append(f"{run.latency.p50_ms:.1f}" if run.latency is not None else "-")
    return tuple(cells)


def failures(report: Report) -> list[str]:
    """One line for each failed run: its name, seed and reason."""
    lines = []
    for run in report.failed:
        seed = f" (seed {run.seed})" if run.seed is not None else ""
        lines.append(f"{run.name}{seed}: FAILED: {run.reason}")
    return lines


def notes(report: Report) -> list[str]:
    """One line for each thing that is missing, with the names of the runs that lack it."""
    lines: dict[str, list[str]] = {}
    for run in report.runs:
        for note in run.notes:
            lines.setdefault(note, []).append(run.name)
    return [f"{', '.join(unique(names))}: {note}" for note, names in lines.items()]


def latency_note(report: Report) -> str:
    """How the latencies were measured; empty without any."""
    kinds = unique(
        "{}x{} pixels, {} threads, {}".format(*run.latency.input_shape, run.latency.threads, run.latency.device)
        for run in report.runs
        if run.latency is not None
    )
    return f"Latency is that of one image: {'; '.join(kinds)}." if kinds else ""


def machine_line(report: Report) -> str:
    """Where the report was made."""
    machine = report.machine
    return (
        f"{machine.cpu}, {machine.threads} threads, device {machine.device}, torch {machine.torch}, "
        f"Python {machine.python}, commit {machine.commit or 'none, not a checkout'}"
    )


def duration(seconds: float) -> str:
    """`12 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _spread(runs: Sequence[RunRecord], metric: str) -> Spread | None:
    """Of a metric over runs; None if one of them lacks it, which a mean of the others would hide."""
    return _spread_of([run.metrics.get(metric) for run in runs])


def _spread_of(values: Sequence[float | None]) -> Spread | None:
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.mean(numbers), std, min(numbers), max(numbers), len(numbers))


def _difference(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> Spread | None:
    """Of mAP: seed by seed over the seeds that both have; of the means, without a spread, if seeds cannot be paired."""
    ours, theirs = ({run.seed: run.metrics.get("mAP") for run in group} for group in (runs, baseline))
    common = [seed for seed in ours if seed in theirs]
    if common and len(ours) == len(runs) and len(theirs) == len(baseline):
        pairs = [(ours[seed], theirs[seed]) for seed in common]
        return _spread_of([None if left is None or right is None else left - right for left, right in pairs])
    means = [_spread(group, "mAP") for group in (runs, baseline)]
    if means[0] is None or means[1] is None:
        return None
    mean = means[0].mean - means[1].mean
    return Spread(mean, None, mean, mean, 1)
