"""How runs compare: spreads over seeds, differences from the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from castling_det.report.records import Report, RunRecord


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for a single value), smallest and largest of `seeds` values."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int

    def text(self, sign: str = "") -> str:
        """`0.312`, or `0.312 ± 0.008` over several; `sign="+"` writes it always."""
        return f"{self.mean:{sign}.3f}" + (f" ± {self.std:.3f}" if self.std is not None else "")


@dataclass(frozen=True)
class Summary:
    """The runs of one name; differences are minus the baseline's. `seeds` runs are ok; `first` is the first of them."""

    name: str
    runs: tuple[RunRecord, ...]
    first: RunRecord
    seeds: int
    metrics: dict[str, Spread]
    difference: Spread | None
    loss: Spread | None
    loss_difference: Spread | None


def summaries(report: Report) -> list[Summary]:
    """One summary a name, in the report's order."""
    baseline = [run for run in report.runs_named(report.baseline) if run.ok]
    result = []
    for name in report.names:
        runs = report.runs_named(name)
        good = [run for run in runs if run.ok]
        metrics = {key: spread_of(run.metrics.get(key) for run in good) for run in good for key in run.metrics}
        others = [] if name == report.baseline else good
        result.append(
            Summary(
                name,
                runs,
                first=[*good, *runs][0],
                seeds=len(good),
                metrics={key: spread for key, spread in metrics.items() if spread is not None},
                difference=_difference(others, baseline, lambda run: run.metrics.get("mAP")),
                loss=spread_of(run.final_loss for run in good),
                loss_difference=_difference(others, baseline, lambda run: run.final_loss),
            )
        )
    return result


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """None if a value is missing: a mean of the others would hide that."""
    found = list(values)
    numbers = [value for value in found if value is not None]
    if not numbers or len(numbers) < len(found):
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.mean(numbers), std, min(numbers), max(numbers), len(numbers))


def _difference(
    runs: Sequence[RunRecord], baseline: Sequence[RunRecord], value: Callable[[RunRecord], float | None]
) -> Spread | None:
    """Seed by seed over the seeds that both have; where seeds cannot be paired, of the means, without a spread."""
    ours, theirs = ({run.seed: value(run) for run in group} for group in (runs, baseline))
    common = [seed for seed in ours if seed in theirs]
    if common and len(ours) == len(runs) and len(theirs) == len(baseline):
        pairs = [(ours[seed], theirs[seed]) for seed in common]
        return spread_of(None if left is None or right is None else left - right for left, right in pairs)
    left_mean, right_mean = (spread_of(map(value, group)) for group in (runs, baseline))
    return spread_of([left_mean.mean - right_mean.mean]) if left_mean and right_mean else None
