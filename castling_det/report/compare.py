"""How runs compare: spreads over seeds, differences from the baseline, latencies in benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from castling_det.config import attention_of, load_config
from castling_det.report.records import Benchmark, BenchmarkRow, Latency, Report, RunRecord, read_document

# What a run's config and the benchmark's may differ in without being another network in prediction.
_INDIFFERENT = frozenset({
    "attention", "threshold", "threshold_unit", "eval_aux", "init_cfg", "train_cfg", "test_cfg", "data_preprocessor",
    "drop_path_rate",
})  # fmt: skip


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


def read_benchmark(path: Path) -> Benchmark:
    """A benchmark's rows that were measured to the end with green parity; ValueError for another file."""
    fix = "measure again with tools/benchmark.py --out DIR"
    found = read_document(path, Benchmark, schema="castling_det.benchmark/1", field="benchmark", fix=fix)
    return replace(found, rows=tuple(row for row in found.rows if row.status == "ok" and row.timing and row.parity_ok))


def crossover(rows: Sequence[BenchmarkRow]) -> tuple[float | None, str]:
    """The number of tokens from which on softmax is slower than linear attention, and a text that says so.

    It is slower at every larger size measured; between two sizes, latencies are straight lines in the logarithms.
    """
    times: dict[str, dict[tuple[int, int, int], float]] = {"softmax": {}, "linear": {}}
    for row in rows:
        if row.timing and row.variant in times:
            times[row.variant][row.tokens, row.height, row.width] = row.timing.p50_ms
    softmax, linear = times.values()
    slower = [(size[0], math.log(softmax[size] / linear[size])) for size in sorted(softmax.keys() & linear.keys())]
    last_faster = max((index for index, (_, ratio) in enumerate(slower) if ratio <= 0), default=-1)
    if not slower:
        return None, "no crossover: no size with both softmax and linear"
    if last_faster == -1:
        return None, f"no crossover in range: softmax is slower from N = {slower[0][0]}, the smallest size"
    if last_faster == len(slower) - 1:
        return None, f"no crossover in range: softmax is not slower at N = {slower[-1][0]}"
    (below, low), (above, high) = slower[last_faster : last_faster + 2]
    tokens = below * (above / below) ** (-low / (high - low))
    return tokens, f"softmax is slower than linear from about N = {tokens:.0f} tokens"


def latency_of(
    benchmarks: Mapping[Path, Benchmark], config: Any, shape: tuple[int, int] | None
) -> tuple[Latency | None, list[str]]:
    """Latency of one image of the detector of `config`, and notes on benchmarks of another detector.

    Of the sizes measured it is the one nearest to `shape` (height, width) in area, or the largest. Hybrids are timed
    as linear attention, which is what is deployed.
    """
    variant = {"softmax": "softmax", "linear": "linear", "castling": "linear"}.get(str(attention_of(config)))
    wanted, notes = ("detector", "forward", 1, variant), []
    for path, benchmark in benchmarks.items():
        rows = [row for row in benchmark.rows if (row.level, row.passes, row.batch, row.variant) == wanted]
        if not rows:
            continue
        name = (benchmark.detector or "").replace("*", str(variant))
        problem = f"its detector {name} is another one; measure this run's with --config-prefix and --config-suffix"
        try:
            same = _network(load_config(name).model) == _network(config.model)
        except ValueError as error:
            same, problem = False, str(error)
        if not same:
            notes.append(f"no latency from {path}: {problem}")
            continue
        area = math.prod(shape) if shape is not None else math.inf
        row = min(rows, key=lambda row: (abs(row.height * row.width - area), -row.height * row.width))
        assert row.timing is not None
        machine, source = benchmark.machine, f"{path}, variant {row.variant}, {row.dtype}"
        size = (row.height, row.width)
        return Latency(row.timing.p50_ms, machine.threads, machine.device, size, row.peak_mib, source), []
    return None, notes


def _network(value: Any) -> Any:
    """The model section without the fields that make no difference in prediction."""
    if isinstance(value, Mapping):
        kept = (key for key in value if key not in _INDIFFERENT and not str(key).startswith("loss"))
        return {key: _network(value[key]) for key in kept}
    return [_network(item) for item in value] if isinstance(value, (list, tuple)) else value
