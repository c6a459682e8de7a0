"""A benchmark as Markdown: to print and to paste into a README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from castling_det.analysis.benchmark.ratios import crossover, fault_of, memory_ratio, speed_up, times_floor
from castling_det.analysis.benchmark.record import BenchmarkReport, BenchmarkRow
from castling_det.analysis.benchmark.variants import BASELINE, FLOOR, LINEAR
from castling_det.report.records import Machine
from castling_det.report.render import markdown_table, one_line

__all__ = ["benchmark_markdown", "machine_line"]

METHOD = (
    "ms: wall time of one call, p50 (p20-p80), over rounds in which each variant, in shuffled order, is called twice "
    "in a row and the second call is timed; float32 without TF32. x softmax: how many times faster than torch's fused "
    "scaled_dot_product_attention without any local convolution. MiB: peak memory beyond what stood before the call, "
    "from a call of its own that is not timed, and that over softmax's. Parity: errors against float64, relative to "
    "the RMS of the reference; no ratio is given where it is red."
)


def benchmark_markdown(report: BenchmarkReport) -> str:
    """Machine, method, a table for each group of rows with its crossover, faults, parity, how it was made."""
    lines = ["# Latency and memory", "", machine_line(report.machine), "", _method(report)]
    for group in report.groups:
        level, passes, dtype, batch = group
        rows = [row for row in report.rows if row.group == group]
        lines += ["", f"## {level}, {passes}, {dtype}, batch {batch}", "", *_latency_table(rows)]
        by_name = {name: [row for row in rows if row.variant == name] for name in (BASELINE, LINEAR)}
        if all(by_name.values()):
            lines += ["", f"Crossover: {crossover(by_name[BASELINE], by_name[LINEAR]).note}."]
    faults = list(_faults(report))
    lines += ["", "## Not measured or not right", "", *faults] if faults else []
    lines += ["", "## Parity", "", *_parity_table(report), "", f"Made by `{report.created_by}`, {report.created_at}."]
    return "\n".join(lines) + "\n"


def machine_line(machine: Machine) -> str:
    """Where and with what it was measured, as one sentence."""
    return (
        f"Machine: {machine.cpu}, {machine.threads} threads, device {machine.device}, torch {machine.torch}, "
        f"Python {machine.python}, commit {machine.commit or 'none, not a checkout'}."
    )


def _method(report: BenchmarkReport) -> str:
    repeats = {row.timing.repeats for row in report.rows if row.timing is not None}
    rounds = f" {'-'.join(map(str, sorted({min(repeats), max(repeats)})))} rounds." if repeats else ""
    model = f" {report.embed_dims} channels, {report.num_heads} heads, backbone of {report.depth} blocks"
    return METHOD + rounds + model + (f"; detector {report.detector}." if report.detector else ".")


def _latency_table(rows: Sequence[BenchmarkRow]) -> list[str]:
    """A row a size, the columns of each variant beside one another."""
    names = list(dict.fromkeys(row.variant for row in rows))
    head, has_floor = ["size (N)"], FLOOR in names
    for name in names:
        head += [f"{name} ms", *_ratio_names(name, has_floor), f"{name} MiB"]
    body = []
    for size in sorted({row.size for row in rows}):
        found = {row.variant: row for row in rows if row.size == size}
        cells = [f"{size[1]} x {size[2]} ({size[0]})"]
        for name in names:
            cells += _cells(found, name, has_floor)
        body.append(cells)
    return markdown_table(head, body)


def _ratio_names(name: str, has_floor: bool) -> list[str]:
    names = [] if name in (BASELINE, FLOOR) else ["x softmax"]
    return names + (["x floor"] if has_floor and name not in (BASELINE, FLOOR) else [])


def _cells(found: dict[str, BenchmarkRow], name: str, has_floor: bool) -> list[str]:
    row, baseline = found.get(name), found.get(BASELINE)
    if row is None or row.timing is None or row.peak_mib is None:
        fault = fault_of(row) or "-"
        return [fault] * (2 + len(_ratio_names(name, has_floor)))
    timing = row.timing
    latency = f"{_number(timing.p50_ms)} ({_number(timing.p20_ms)}-{_number(timing.p80_ms)})"
    if name in (BASELINE, FLOOR):
        return [latency, _number(row.peak_mib)]
    ratios = [speed_up(row, baseline), *([times_floor(row, found.get(FLOOR))] if has_floor else [])]
    return [latency, *ratios, f"{_number(row.peak_mib)} ({memory_ratio(row, baseline)})"]


def _faults(report: BenchmarkReport) -> Iterator[str]:
    for row in report.rows:
        fault = fault_of(row)
        if fault is not None:
            size = f"{row.height} x {row.width}"
            where = f"{row.level}, {row.passes}, {row.dtype}, batch {row.batch}, {size}, {row.variant}"
            yield f"- {fault.upper()}: {where}: {one_line(row.reason or _errors(row))}"


def _errors(row: BenchmarkRow) -> str:
    return (
        f"RMS {_error(row.parity_rms)} (allowed {_error(row.tolerance_rms)}), "
        f"max {_error(row.parity_max)} (allowed {_error(row.tolerance_max)}) of {row.compared}"
    )


def _parity_table(report: BenchmarkReport) -> list[str]:
    """The row nearest to its tolerance, or farthest beyond it, for each level, pass, dtype and variant."""
    groups: dict[tuple[str, ...], list[BenchmarkRow]] = {}
    for row in report.rows:
        if row.parity_ok is not None:
            groups.setdefault((row.level, row.passes, row.dtype, row.variant), []).append(row)
    head = ["worst of its sizes", "N", "RMS", "allowed", "max", "allowed", "parity"]
    body = []
    for key, rows in groups.items():
        worst = max(rows, key=_closeness)
        numbers = (worst.parity_rms, worst.tolerance_rms, worst.parity_max, worst.tolerance_max)
        verdict = "red" if worst.parity_red else "green"
        body.append([", ".join(key), str(worst.tokens), *map(_error, numbers), verdict])
    return markdown_table(head, body)


def _closeness(row: BenchmarkRow) -> float:
    if row.parity_rms is None or row.parity_max is None:
        return float("inf")
    assert row.tolerance_rms is not None and row.tolerance_max is not None
    return max(row.parity_rms / row.tolerance_rms, row.parity_max / row.tolerance_max)


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _number(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
