"""The ratios that the attention is built to reach, and where a benchmark says that it stands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from castling_det.analysis.benchmark.ratios import fault_of
from castling_det.analysis.benchmark.record import BenchmarkReport, BenchmarkRow
from castling_det.analysis.benchmark.variants import BASELINE, FLOOR, LINEAR, NATIVE
from castling_det.report.render import markdown_table

__all__ = ["GOALS", "Goal", "goals_markdown"]

_FORWARD, _TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class _Case:
    """Which row of the reports; all in float32."""

    variant: str
    side: int
    level: str = "core"
    passes: str = _FORWARD
    batch: int = 1

    def find(self, rows: Iterable[BenchmarkRow]) -> BenchmarkRow | None:
        wanted = (self.variant, self.side, self.side, self.level, self.passes, self.batch, "float32")
        for row in rows:
            if (row.variant, row.height, row.width, row.level, row.passes, row.batch, row.dtype) == wanted:
                return row
        return None


@dataclass(frozen=True)
class Goal:
    """A ratio of two rows of one benchmark and its bound."""

    case: str
    upper: _Case
    lower: _Case
    at_least: float = -math.inf
    at_most: float = math.inf
    of: str = "time"
    """`"time"`, the median latency, or `"memory"`, the peak."""

    def ratio(self, reports: Sequence[BenchmarkReport]) -> float | None:
        """From the first report that has both rows; None where none has, or where a row failed or parity is red."""
        for report in reports:
            upper, lower = self.upper.find(report.rows), self.lower.find(report.rows)
            if upper is not None and lower is not None:
                usable = fault_of(upper) is None and fault_of(lower) is None
                return _VALUES[self.of](upper) / _VALUES[self.of](lower) if usable else None
        return None

    def bound(self) -> str:
        """The goal in words."""
        return f"at least {self.at_least:g}x" if self.at_most == math.inf else f"at most {self.at_most:g}x"


def _p50_ms(row: BenchmarkRow) -> float:
    assert row.timing is not None
    return row.timing.p50_ms


def _peak_mib(row: BenchmarkRow) -> float:
    assert row.peak_mib is not None
    return row.peak_mib


_VALUES: dict[str, Callable[[BenchmarkRow], float]] = {"time": _p50_ms, "memory": _peak_mib}


def _faster(case: str, slow: _Case, at_least: float) -> Goal:
    """The linear row of the same case against `slow`."""
    return Goal(case, slow, _Case(LINEAR, slow.side, slow.level, slow.passes, slow.batch), at_least=at_least)


def _hybrid(variant: str) -> _Case:
    return _Case(variant, 64, passes=_TRAINING, batch=2)


GOALS: tuple[Goal, ...] = (
    _faster("core, N = 256: softmax / linear", _Case(BASELINE, 16), 1),
    _faster("core, N = 1024: softmax / linear", _Case(BASELINE, 32), 6),
    _faster("core, N = 4096: softmax / linear", _Case(BASELINE, 64), 25),
    _faster("core, N = 1024: published / linear", _Case("published", 32), 2.5),
    _faster("core, N = 4096: published / linear", _Case("published", 64), 2.5),
    _faster("core, N = 16384: published / linear", _Case("published", 128), 2.5),
    Goal("core, N = 1024: linear / floor", _Case(LINEAR, 32), _Case(FLOOR, 32), at_most=2),
    Goal("core, N = 4096: linear / floor", _Case(LINEAR, 64), _Case(FLOOR, 64), at_most=2),
    Goal("core, N = 16384: linear / floor", _Case(LINEAR, 128), _Case(FLOOR, 128), at_most=2),
    Goal("core: linear at N = 16384 / linear at N = 1024", _Case(LINEAR, 128), _Case(LINEAR, 32), at_most=20),
    _faster("core, training step, N = 4096: softmax / linear", _Case(BASELINE, 64, passes=_TRAINING), 12),
    Goal(
        "hybrid core, training step, N = 4096, batch 2, memory: hybrid / softmax",
        _hybrid("castling"),
        _hybrid(BASELINE),
        at_most=1.5,
        of="memory",
    ),
    Goal(
        "the same, memory: hybrid / dense formulation",
        _hybrid("castling"),
        _hybrid("dense"),
        at_most=0.1,
        of="memory",
    ),
    Goal("the same, time: hybrid / softmax", _hybrid("castling"), _hybrid(BASELINE), at_most=3),
    Goal("the same, time: hybrid, mask empty / linear", _hybrid("castling_empty"), _hybrid(LINEAR), at_most=1.03),
    _faster("ViT-S backbone, 1024 x 1024 pixels: softmax / linear", _Case(BASELINE, 1024, level="backbone"), 2.3),
)
"""Batch 1, width 384, 6 heads, float32. `softmax` is fused; `floor` is the two matrix products and the convolution."""


def with_kernel(goal: Goal) -> Goal | None:
    """The same goal for the compiled kernel; None where it has no part, as in training."""

    def swapped(case: _Case) -> _Case:
        return dataclasses.replace(case, variant=NATIVE) if case.variant == LINEAR else case

    if _TRAINING in (goal.upper.passes, goal.lower.passes):
        return None
    return dataclasses.replace(goal, upper=swapped(goal.upper), lower=swapped(goal.lower))


def goals_markdown(reports: Sequence[BenchmarkReport]) -> str:
    """Every goal, what plain operations and the compiled kernel measured, and which of them reach it."""
    body = []
    for goal in GOALS:
        compiled = with_kernel(goal)
        ratios = {
            "plain": goal.ratio(reports),
            "kernel": None if compiled is None else compiled.ratio(reports),
        }
        reached = [
            name for name, ratio in ratios.items() if ratio is not None and goal.at_least <= ratio <= goal.at_most
        ]
        measured = [name for name, ratio in ratios.items() if ratio is not None]
        verdict = "-" if not measured else "yes" if reached == measured else f"{reached[0]} only" if reached else "NO"
        plain = _ratio_text(ratios["plain"], "not measured")
        body.append([goal.case, goal.bound(), plain, _ratio_text(ratios["kernel"], ""), verdict])
    return "\n".join(markdown_table(["case", "goal", "plain", "kernel", "reached"], body)) + "\n"


def _ratio_text(ratio: float | None, missing: str) -> str:
    return missing if ratio is None else f"{ratio:.2f}x"
