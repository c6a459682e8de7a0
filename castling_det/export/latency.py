"""Latency of a detector in each runtime, linear attention beside the softmax baseline that is exported the same way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor

from castling_det.analysis.benchmark import Timing, machine_line
from castling_det.analysis.benchmark.measure import call_seconds, settle_allocator, timing_of
from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.export.export import example_shape
from castling_det.export.network import DeployedDetector
from castling_det.export.onnx_file import onnx_model, onnx_runner, with_outputs
from castling_det.export.program import example_images, export_program
from castling_det.files import write_text
from castling_det.report.configs import load_config
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table

__all__ = ["ATTENTIONS", "RUNTIMES", "SCHEMA", "LatencyReport", "LatencyRow", "measure_latency", "read_latency"]

SCHEMA = "castling_det.export.latency/1"
FIELD = "report"
ATTENTIONS = ("linear", "softmax")
RUNTIMES = ("eager", "compile", "aoti", "onnxruntime")
LEAST_REPEATS, MOST_REPEATS = 3, 50

Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class LatencyRow:
    """One detector in one runtime at one size."""

    attention: str
    runtime: str
    size: int
    """Side of the square image, in pixels."""
    timing: Timing | None
    """None where it failed."""
    reason: str = ""


@dataclass(frozen=True)
class LatencyReport:
    """Every combination that was asked for."""

    config: str
    command: str
    machine: Machine
    rows: tuple[LatencyRow, ...]

    @property
    def failed(self) -> bool:
        """Whether a row has no time."""
        return any(row.timing is None for row in self.rows)

    def markdown(self) -> str:
        """Median milliseconds, and how many times softmax's is linear's."""
        found = {(row.runtime, row.size, row.attention): row for row in self.rows}
        sizes = sorted({row.size for row in self.rows})
        head = ["runtime", *(f"{size}: {text}" for size in sizes for text in ("softmax ms", "linear ms", "ratio"))]
        body = []
        for runtime in dict.fromkeys(row.runtime for row in self.rows):
            cells = [runtime]
            for size in sizes:
                softmax, linear = (_median(found.get((runtime, size, name))) for name in ("softmax", "linear"))
                ratio = f"{softmax / linear:.2f}" if softmax and linear else "-"
                cells += [*(f"{value:.1f}" if value else "-" for value in (softmax, linear)), ratio]
            body.append(cells)
        faults = [
            f"- {row.attention}, {row.runtime}, {row.size}: failed: {row.reason}" for row in self.rows if row.reason
        ]
        lines = [
            f"{self.config}:",
            "",
            *markdown_table(head, body),
            "",
            "One image, from pixels to boxes, medians; random weights, so that suppression has little to do.",
            *faults,
            "",
            f"`{self.command}`",
            "",
            machine_line(self.machine),
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """`latency.json` and `latency.md`."""
        write_document(folder / "latency.json", self, schema=SCHEMA, field=FIELD)
        write_text(folder / "latency.md", self.markdown())


def read_latency(path: str | os.PathLike[str]) -> LatencyReport:
    """Reads what `LatencyReport.write` wrote; raises ValueError for anything else."""
    return read_document(path, LatencyReport, schema=SCHEMA, field=FIELD, fix="run tools/deployed_latency.py again")


def measure_latency(
    config: str | os.PathLike[str] | Config,
    *,
    sizes: Sequence[int],
    attentions: Sequence[str] = ATTENTIONS,
    runtimes: Sequence[str] = RUNTIMES,
    max_seconds: float = 30.0,
    command: str = "",
) -> LatencyReport:
    """Builds and exports each detector once, and times them in turns at each size.

    Args:
        config: a detector's, of any attention.
        sizes: sides of square images in pixels, multiples of the detector's `pad_size_divisor`.
        attentions, runtimes: some of `ATTENTIONS` and `RUNTIMES`.
        max_seconds: of each row, beyond three calls.

    Raises:
        ValueError: unusable config or option. A runtime that fails is a row that says so.
    """
    for name, values, known in (("attentions", attentions, ATTENTIONS), ("runtimes", runtimes, RUNTIMES)):
        if not values or set(values) - set(known):
            raise ValueError(f"{name}={tuple(values)}: expected some of {', '.join(known)}")
    settle_allocator()
    loaded = load_config(config) if not isinstance(config, Config) else config
    subjects: dict[tuple[str, str], Call | str] = {}
    networks: dict[str, DeployedDetector] = {}
    with tempfile.TemporaryDirectory() as folder:
        for attention in attentions:
            network = _network(loaded, attention)
            networks[attention] = network
            unit = network.normalization.pad_size_divisor
            if not sizes or any(size < unit or size % unit for size in sizes):
                raise ValueError(f"sizes={tuple(sizes)}: expected multiples of pad_size_divisor={unit}")
            for runtime in runtimes:
                try:
                    subjects[attention, runtime] = _MAKERS[runtime](loaded, attention, Path(folder))
                except Exception as error:  # compilers and exporters fail in any way
                    subjects[attention, runtime] = _reason(error)
        rows = [row for size in sizes for row in _timed(size, subjects, next(iter(networks.values())), max_seconds)]
    return LatencyReport(Path(loaded.filename or "").name, command, this_machine(), tuple(rows))


def _timed(
    size: int, subjects: dict[tuple[str, str], Call | str], network: DeployedDetector, max_seconds: float
) -> list[LatencyRow]:
    images = example_images(network, (1, size, size))
    seconds: dict[tuple[str, str], list[float]] = {}
    reasons = {name: call for name, call in subjects.items() if isinstance(call, str)}
    calls = {name: call for name, call in subjects.items() if not isinstance(call, str)}
    # All are warm before any is timed, and all take turns: a busy moment slows each of them.
    for name, call in calls.items():
        try:
            call(images)
            seconds[name] = []
        except Exception as error:  # out of memory, an unsupported size
            reasons[name] = _reason(error)
    spent = dict.fromkeys(seconds, 0.0)
    for _ in range(MOST_REPEATS):
        for name, samples in seconds.items():
            if len(samples) < LEAST_REPEATS or spent[name] < max_seconds:
                samples.append(call_seconds(lambda call=calls[name]: call(images), "cpu"))  # type: ignore[misc]
                spent[name] += samples[-1]
    return [
        LatencyRow(*name, size, timing_of(seconds[name]) if name in seconds else None, reasons.get(name, ""))
        for name in subjects
    ]


def _network(config: Config, attention: str, *, nms_as_operator: bool = True) -> DeployedDetector:
    torch.manual_seed(0)
    detector = build_detector(with_attention(config, attention))
    return DeployedDetector(detector, nms_as_operator=nms_as_operator).eval()


def _eager(config: Config, attention: str, folder: Path) -> Call:
    return torch.no_grad()(_network(config, attention, nms_as_operator=False))


def _compiled(config: Config, attention: str, folder: Path) -> Call:
    network = _network(config, attention, nms_as_operator=False)
    return torch.no_grad()(torch.compile(network, dynamic=False))


def _aoti(config: Config, attention: str, folder: Path) -> Call:
    network = _network(config, attention, nms_as_operator=False)
    path = str(folder / f"{attention}.pt2")
    torch._inductor.aoti_compile_and_package(export_program(network, example_shape(network)), package_path=path)
    return torch.no_grad()(torch._inductor.aoti_load_package(path))


def _onnxruntime(config: Config, attention: str, folder: Path) -> Call:
    network = _network(config, attention)
    model = onnx_model(export_program(network, example_shape(network)))
    detections = with_outputs(model, lambda name: not name.startswith("raw_"), {})
    run = onnx_runner(detections.SerializeToString())
    return lambda images: run(images.numpy())


_MAKERS: dict[str, Callable[[Config, str, Path], Call]] = {
    "eager": _eager,
    "compile": _compiled,
    "aoti": _aoti,
    "onnxruntime": _onnxruntime,
}


def _median(row: LatencyRow | None) -> float | None:
    return None if row is None or row.timing is None else row.timing.p50_ms


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
