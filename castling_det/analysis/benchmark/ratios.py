"""What is derived from two rows: a number only where both were measured and both parities are green."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from castling_det.analysis.benchmark.record import BenchmarkRow

__all__ = ["Crossover", "crossover", "fault_of", "memory_ratio", "speed_up", "times_floor"]

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Crossover:
    """Where softmax becomes slower than linear attention: at `tokens`, or None where `note` says why there is none."""

    tokens: float | None
    note: str


def fault_of(row: BenchmarkRow | None) -> str | None:
    """Why no ratio may be made of `row`, in two words, or None if it may."""
    if row is None:
        return NOT_MEASURED
    if not row.ok:
        return row.status
    return "parity red" if row.parity_red else None


def speed_up(row: BenchmarkRow | None, baseline: BenchmarkRow | None) -> str:
    """Median latency of `baseline` over that of `row`: `2.00x` is twice as fast."""
    return _ratio(baseline, row, _p50)


def times_floor(row: BenchmarkRow | None, floor: BenchmarkRow | None) -> str:
    """Median latency of `row` over that of the bare products and convolution."""
    return _ratio(row, floor, _p50)


def memory_ratio(row: BenchmarkRow | None, baseline: BenchmarkRow | None) -> str:
    """Peak memory of `row` over that of `baseline`: `0.50x` is half."""
    return _ratio(row, baseline, _peak)


def crossover(baseline: Iterable[BenchmarkRow], linear: Iterable[BenchmarkRow]) -> Crossover:
    """The length from which on softmax is slower at every size measured, interpolated between two of them.

    The median latencies are taken as straight lines in the logarithms. Sizes at which either row failed or has a red
    parity do not count.
    """
    medians = {row.size: _p50(row) for row in linear if fault_of(row) is None}
    points = sorted((row.size, math.log(_p50(row) / medians[row.size])) for row in baseline
                    if fault_of(row) is None and row.size in medians)  # fmt: skip
    if not points:
        return Crossover(None, "no crossover: no size with both softmax and linear measured and parity green")
    return _crossing([(size[0], slower) for size, slower in points])


def _crossing(points: Sequence[tuple[int, float]]) -> Crossover:
    """Of ascending tokens and the logarithm of softmax's latency over linear's."""
    first_slower = len(points)
    while first_slower and points[first_slower - 1][1] > 0:
        first_slower -= 1
    if first_slower == len(points):
        return Crossover(None, f"no crossover in range: softmax is not slower at N = {points[-1][0]}")
    if first_slower == 0:
        return Crossover(None, f"no crossover in range: softmax is slower from N = {points[0][0]}, the smallest size")
    (below, faster), (above, slower) = points[first_slower - 1], points[first_slower]
    share = -faster / (slower - faster)
    tokens = math.exp(math.log(below) + share * math.log(above / below))
    return Crossover(tokens, f"softmax is slower than linear from about N = {tokens:.0f} tokens")


def _ratio(upper: BenchmarkRow | None, lower: BenchmarkRow | None, of: Callable[[BenchmarkRow], float]) -> str:
    faults = {fault for row in (upper, lower) if (fault := fault_of(row)) is not None}
    if faults:
        # A failure says more than a ratio that was never asked for.
        return min(faults, key=lambda fault: fault == NOT_MEASURED)
    assert upper is not None and lower is not None
    return f"{of(upper) / of(lower):.2f}x" if of(lower) > 0 else NOT_MEASURED


def _p50(row: BenchmarkRow) -> float:
    assert row.timing is not None
    return row.timing.p50_ms


def _peak(row: BenchmarkRow) -> float:
    assert row.peak_mib is not None
    return row.peak_mib
