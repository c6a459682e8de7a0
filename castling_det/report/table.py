"""The headline table: runs of one name are one row, with the spread over seeds; a failed run is never left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from castling_det.report.record import Latency, Report, RunRecord, unique

__all__ = [
    "Spread",
    "Summary",
    "duration",
    "failures",
    "headline_cells",
    "headline_columns",
    "interval_note",
    "latency_note",
    "machine_line",
    "notes",
    "paired_difference",
    "spread_of",
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
        keys = unique(key for run in good for key in run.metrics)
        spreads = {key: spread_of([_metric(key)(run) for run in good]) for key in keys}
        metrics = {key: spread for key, spread in spreads.items() if spread is not None}
        difference = None if name == report.baseline else paired_difference(good, baseline, _metric("mAP"))
        result.append(Summary(name, runs, metrics, difference))
    return tuple(result)


def headline_columns(report: Report, *, brief: bool = False) -> tuple[str, ...]:
    """Titles of the table, units in them; a column is there where a run has its figure. `brief` leaves out details."""
    return tuple(column.title for column in _columns(report, brief))


def headline_cells(report: Report, summary: Summary, *, brief: bool = False) -> tuple[str, ...]:
    """The cells of one row, in the order of `headline_columns`; a dash where there is no number."""
    return tuple(column.cell(summary) for column in _columns(report, brief))


def _columns(report: Report, brief: bool) -> list[_Column]:
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    columns = [
        _Column("run", lambda summary: summary.name),
        _Column("seeds", _seeds_cell),
        _metric_column("mAP"),
        _Column(f"mAP - {report.baseline}", lambda summary: _difference_cell(report, summary)),
    ]
    if report.differences:
        title = f"{report.differences[0].confidence:.0%} interval"
        columns.append(_Column(title, lambda summary: _interval_cell(report, summary)))
    columns += [_metric_column(name) for name in ("mAP50", "mAP75")]
    sizes = () if brief else ("mAP_s", "mAP_m", "mAP_l")
    columns += [_metric_column(name) for name in sizes if any(run.metrics.get(name) is not None for run in report.runs)]
    columns += [
        _first_column("params (M)", lambda run: run.params and run.params / 1e6, ".2f"),
        _first_column("GMACs" + (" at {}x{}".format(*shape) if shape else ""), lambda run: run.gmacs, ".3f"),
    ]
    measured = [run.latency for run in report.runs if run.latency is not None]
    if measured:
        columns.append(_latency_column("latency p50 (ms)", lambda latency: latency.p50_ms, ".1f"))
    if not brief and any(latency.peak_mib is not None for latency in measured):
        columns.append(_latency_column("peak memory (MiB)", lambda latency: latency.peak_mib, ".1f"))
    if not brief and any(run.train_seconds is not None for run in report.runs):
        columns.append(_Column("training", _training_cell))
    return columns


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Summary], str]


def _metric_column(name: str) -> _Column:
    return _Column(name, lambda summary: summary.metrics[name].text() if name in summary.metrics else "-")


def _first_column(title: str, value: Callable[[RunRecord], float | None], form: str) -> _Column:
    """Of what does not depend on the seed."""

    def cell(summary: Summary) -> str:
        found = value(summary.first)
        return "-" if found is None else format(found, form)

    return _Column(title, cell)


def _latency_column(title: str, value: Callable[[Latency], float | None], form: str) -> _Column:
    return _first_column(title, lambda run: value(run.latency) if run.latency is not None else None, form)


def _seeds_cell(summary: Summary) -> str:
    failed = len(summary.runs) - summary.seeds
    return f"{summary.seeds} (FAILED: {failed})" if failed else str(summary.seeds)


def _difference_cell(report: Report, summary: Summary) -> str:
    if summary.name == report.baseline:
        return "baseline"
    return summary.difference.text(sign="+") if summary.difference is not None else "-"


def _interval_cell(report: Report, summary: Summary) -> str:
    found = report.difference_of(summary.name)
    return f"{found.low:+.3f} to {found.high:+.3f}" if found is not None else "-"


def _training_cell(summary: Summary) -> str:
    seconds = [run.train_seconds for run in summary.runs if run.ok and run.train_seconds is not None]
    return duration(statistics.mean(seconds)) if seconds else "-"


def interval_note(report: Report) -> str:
    """What the intervals are; empty without any."""
    if not report.differences:
        return ""
    first = report.differences[0]
    pairs = sorted({difference.pairs for difference in report.differences})
    mean = f", mean over {' or '.join(map(str, pairs))} seeds" if pairs != [1] else ""
    return (
        f"The {first.confidence:.0%} interval of the difference is a bootstrap over the {first.images} test images: "
        f"{first.resamples} draws with replacement (seed {first.bootstrap_seed}), both detectors on the same "
        f"draws{mean}. It covers the choice of images, not that of training seeds."
    )


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
    measured = [run.latency for run in report.runs if run.latency is not None]
    kinds = unique("{}x{} pixels, {} threads, {}".format(*m.input_shape, m.threads, m.device) for m in measured)
    if not kinds:
        return ""
    sources = unique(latency.source for latency in measured if latency.source is not None)
    bare = any("variant softmax," in source for source in sources)
    lines = [f"Latency is that of one image: {'; '.join(kinds)}."]
    lines += [f"From {'; '.join(sources)}."] if sources else []
    lines += ["Benchmarks time softmax without the local convolution that our softmax runs have."] if bare else []
    return " ".join(lines)


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


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """None if a value is missing, which a mean of the others would hide."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.mean(numbers), std, min(numbers), max(numbers), len(numbers))


def paired_difference(
    runs: Sequence[RunRecord], baseline: Sequence[RunRecord], value: Callable[[RunRecord], float | None]
) -> Spread | None:
    """Seed by seed over the seeds that both have; of the means, without a spread, where seeds cannot be paired."""
    ours, theirs = ({run.seed: value(run) for run in group} for group in (runs, baseline))
    common = [seed for seed in ours if seed in theirs]
    if common and len(ours) == len(runs) and len(theirs) == len(baseline):
        pairs = [(ours[seed], theirs[seed]) for seed in common]
        return spread_of([None if left is None or right is None else left - right for left, right in pairs])
    means = [spread_of([value(run) for run in group]) for group in (runs, baseline)]
    if means[0] is None or means[1] is None:
        return None
    mean = means[0].mean - means[1].mean
    return Spread(mean, None, mean, mean, 1)


def _metric(name: str) -> Callable[[RunRecord], float | None]:
    return lambda run: run.metrics.get(name)
