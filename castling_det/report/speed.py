"""Latency and memory from the records of tools/benchmark.py: nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castling_det.analysis.benchmark import BenchmarkReport, BenchmarkRow, read_benchmark
from castling_det.analysis.benchmark.ratios import crossover, fault_of
from castling_det.analysis.benchmark.variants import BASELINE, LINEAR
from castling_det.config import attention_of, load_config
from castling_det.report.record import Latency, Speed, SpeedPoint

__all__ = ["Benchmarks"]

# What a run's config and the benchmark's may differ in without being another network in prediction.
_INDIFFERENT = frozenset({
    "attention", "threshold", "threshold_unit", "eval_aux", "init_cfg", "train_cfg", "test_cfg", "data_preprocessor",
    "drop_path_rate",
})  # fmt: skip


class Benchmarks:
    """Records of tools/benchmark.py.

    Args:
        paths: their JSON files.

    Raises:
        ValueError: not such a record; names the file and the fix.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._reports = [(path, read_benchmark(path)) for path in paths]

    def speeds(self) -> tuple[Speed, ...]:
        """Every table of every record that has softmax and linear attention, as lines over the input's size."""
        return tuple(
            speed
            for path, report in self._reports
            for group in report.groups
            if (speed := _speed(path, report, [row for row in report.rows if row.group == group])) is not None
        )

    def latency(self, config: Any, shape: tuple[int, int] | None) -> tuple[Latency | None, list[str]]:
        """Latency of one image of the detector of `config`, and notes on records that say nothing of it.

        Of the sizes measured it is that nearest to `shape` (height, width) in area, or the largest. Hybrids are
        timed as what is deployed.

        Args:
            config: of the run.
            shape: input at which multiply-adds are counted.
        """
        attention, notes = attention_of(config), []
        variant = {"softmax": BASELINE, "linear": LINEAR, "castling": LINEAR}.get(str(attention))
        for path, report in self._reports:
            rows = [row for row in report.rows if _times_one_image(row, variant)]
            if not rows:
                continue
            problem = _other_detector(report, variant or "", config)
            if problem is not None:
                notes.append(f"no latency from {path}: {problem}")
                continue
            area = shape[0] * shape[1] if shape is not None else max(row.height * row.width for row in rows)
            row = min(rows, key=lambda row: abs(row.height * row.width - area))
            assert row.timing is not None
            source = f"{path}, variant {row.variant}, {row.dtype}"
            place = (row.height, row.width)
            device = report.machine.device
            return Latency(row.timing.p50_ms, report.machine.threads, device, place, row.peak_mib, source), []
        return None, notes


def _times_one_image(row: BenchmarkRow, variant: str | None) -> bool:
    wanted = (row.level, row.passes, row.batch, row.variant) == ("detector", "forward", 1, variant)
    return wanted and fault_of(row) is None


def _other_detector(report: BenchmarkReport, variant: str, config: Any) -> str | None:
    """Why the record's detector is not that of `config`; None if it is."""
    name = (report.detector or "").replace("*", variant)
    try:
        measured = load_config(name)
    except ValueError as error:
        return str(error)
    if _network(measured.model) != _network(config.model):
        return f"its detector {name} is another one; measure with --config-prefix and --config-suffix of this run"
    return None


def _network(value: Any) -> Any:
    """The model section without what makes no difference in prediction."""
    if isinstance(value, Mapping):
        kept = (key for key in value if key not in _INDIFFERENT and not str(key).startswith("loss"))
        return {key: network for key in kept if (network := _network(value[key])) != {}}
    return [_network(item) for item in value] if isinstance(value, (list, tuple)) else value


def _speed(path: Path, report: BenchmarkReport, rows: Sequence[BenchmarkRow]) -> Speed | None:
    by_variant = {name: [row for row in rows if row.variant == name] for name in (BASELINE, LINEAR)}
    good = sorted((row for row in rows if fault_of(row) is None), key=lambda row: (row.variant, row.size))
    if not all(any(fault_of(row) is None for row in found) for found in by_variant.values()):
        return None
    crossing = crossover(by_variant[BASELINE], by_variant[LINEAR])
    level, passes, dtype, batch = rows[0].group
    return Speed(
        source=str(path),
        created_by=report.created_by,
        level=level,
        passes=passes,
        dtype=dtype,
        batch=batch,
        machine=report.machine,
        points=tuple(_point(row) for row in good),
        crossover_tokens=crossing.tokens,
        crossover_note=crossing.note,
    )


def _point(row: BenchmarkRow) -> SpeedPoint:
    timing, peak = row.timing, row.peak_mib
    assert timing is not None and peak is not None
    return SpeedPoint(row.variant, row.height, row.width, row.tokens, timing.p20_ms, timing.p50_ms, timing.p80_ms, peak)
