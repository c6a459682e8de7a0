"""Times softmax, linear and hybrid attention, and measures their peak memory, after checking that each is right.

Outputs and gradients of every variant are compared with `castling_det.ops.naive` in float64 before it is timed. Where
they are off, times are shown and ratios are not. Writes benchmark.json, benchmark.md and benchmark.png into --out.
Exit code: 0; 1 if a row failed, a parity is red or an argument is wrong.

  tools/benchmark.py --levels core block --sizes 16 32 64 --dtypes float32 --threads 2 --out work_dirs/benchmark
  tools/benchmark.py --render work_dirs/benchmark/benchmark.json
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from castling_det.files import atomic_write, write_text
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table
from tools.benchmarks.variants import CONFIG, LEVELS, PASSES, VARIANTS, Call, Variant, build_call, reference_of

SCHEMA = "castling_det.benchmark/1"
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1.5e-2, 0.2), "float16": (2e-3, 0.03)}
"""RMS and largest error of one layer, relative to the RMS of the reference."""
GRADIENT_TOKENS = 4096
"""Longest sequence at which gradients are compared: the reference forms N x N matrices."""
ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Percentiles of the time of a call in milliseconds, over `repeats` measurements."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Row:
    """One variant in one case. Where `status` is not `"ok"`, `reason` says why, and what was not measured is None.

    `height` and `width` are of the token map (core, block) or of the image in pixels; `tokens` is the length of the
    longest sequence. `peak_mib` is memory beyond what stood before the call. Errors are relative to the RMS of the
    reference.
    """

    level: str
    variant: str
    passes: str
    dtype: str
    batch: int
    height: int
    width: int
    tokens: int
    status: str
    reason: str | None = None
    timing: Timing | None = None
    peak_mib: float | None = None
    parity_rms: float | None = None
    parity_max: float | None = None
    parity_ok: bool | None = None
    tolerance_rms: float | None = None
    tolerance_max: float | None = None
    compared: str | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Sorts by the length of the sequence."""
        return self.tokens, self.height, self.width

    @property
    def group(self) -> tuple[str, str, str, int]:
        """Rows of one group stand in one table."""
        return self.level, self.passes, self.dtype, self.batch

    @property
    def fault(self) -> str | None:
        """Why no ratio may be made of this row; None if it may."""
        return self.status if self.status != "ok" else None if self.parity_ok else "parity red"


@dataclass(frozen=True)
class Benchmark:
    """All rows of a run. `detector` is the pattern of the measured detector's configs, if any was."""

    machine: Machine
    created_by: str
    created_at: str
    embed_dims: int
    num_heads: int
    depth: int
    detector: str | None
    rows: tuple[Row, ...]

    def groups(self) -> dict[tuple[str, str, str, int], list[Row]]:
        """The rows by group, in the order measured."""
        found: dict[tuple[str, str, str, int], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def read_benchmark(path: Path) -> Benchmark:
    """Reads benchmark.json; raises ValueError for another file."""
    fix = "measure again with tools/benchmark.py --out DIR"
    return read_document(path, Benchmark, schema=SCHEMA, field="benchmark", fix=fix)


def _parity(call: Call, row: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """Worst errors over the output and the gradients, and their bounds."""
    rms, largest = TOLERANCES[row["dtype"]]
    if variant.masked:  # an entry that rounds to the other side of the threshold 1/N moves an output by 1/N
        rms, largest = rms + 0.5 / row["tokens"], largest + 8 / row["tokens"]
    if row["level"] in ("backbone", "detector"):  # roundings of d layers add up like sqrt(d)
        rms, largest = 3 * rms, 3 * largest
    actual, compared = call(), "output"
    with_gradients = call.backward and row["tokens"] <= GRADIENT_TOKENS
    exact = reference_of(call, backward=with_gradients)
    expected = exact()
    if with_gradients:
        actual, expected, compared = actual + call.gradients(), expected + exact.gradients(), "output and gradients"
        if row["level"] == "detector":  # an activation within a rounding of zero takes its gradient along
            flips = math.sqrt(torch.finfo(call.x.dtype).eps / 2)
            rms, largest = rms + 8 * flips, largest + 64 * flips
    errors = [
        ((a.detach().double() - e.detach()).abs() / e.detach().square().mean().sqrt()).flatten()
        for a, e in zip(actual, expected, strict=True)
    ]
    found_rms, found_max = (max(map(float, of)) for of in zip(*((e.square().mean().sqrt(), e.max()) for e in errors),
                                                             strict=True))  # fmt: skip
    finite = all(bool(error.isfinite().all()) for error in errors)
    return {
        "parity_rms": found_rms if finite else None,
        "parity_max": found_max if finite else None,
        "parity_ok": finite and found_rms <= rms and found_max <= largest,
        "tolerance_rms": rms,
        "tolerance_max": largest,
        "compared": compared,
    }


def _peak_mib(call: Callable[[], object], device: str) -> float:
    """The most memory that stands during a call beyond what stood before it; its result is part of it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    standing = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(max(standing, default=0)) / 2**20


def measure(options: argparse.Namespace, created_by: str) -> Benchmark:
    """Measures every case; a failure is a row."""
    if options.embed_dims % options.num_heads:
        raise ValueError(f"--num-heads {options.num_heads}: expected a divisor of --embed-dims {options.embed_dims}")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(options.threads)
    # glibc returns freed pages at once until it has seen one large block; inside a network it has.
    torch.empty(31 << 20, dtype=torch.uint8)
    cases = [
        (level, passes, dtype, hw)
        for level, passes, dtype in product(options.levels, options.passes, options.dtypes)
        for hw in (options.sizes if level in ("core", "block") else options.image_sizes)
    ]
    rows = [
        row
        for case in track(cases, "benchmark", console=Console(stderr=True), transient=True)
        for row in _measured(*case, options)
    ]
    machine = asdict(this_machine()) | ({} if options.device == "cuda" else {"device": "cpu"})
    return Benchmark(
        machine=Machine(**machine),
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        embed_dims=options.embed_dims,
        num_heads=options.num_heads,
        depth=options.depth,
        detector=f"{options.config_prefix}_*{options.config_suffix}" if "detector" in options.levels else None,
        rows=tuple(rows),
    )


def _measured(level: str, passes: str, dtype: str, hw: tuple[int, int], options: argparse.Namespace) -> Iterator[Row]:
    """All variants are checked and warm before any is timed, and they are timed in turns."""
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, Timer] = {}
    for name in options.variants:
        if name == "floor" and (level, passes) != ("core", "forward"):
            continue
        row = rows[name] = dict(
            level=level, variant=name, passes=passes, dtype=dtype, batch=options.batch, height=hw[0], width=hw[1],
            tokens=0, status="ok",
        )  # fmt: skip
        try:
            call, row["tokens"] = build_call(level, name, passes, dtype, hw, options)
            longest = VARIANTS[name].max_tokens
            if longest is not None and row["tokens"] > longest:
                row.update(status="skipped", reason=f"{name} is measured up to N = {longest}")
                continue
            row.update(_parity(call, row, VARIANTS[name]))
            row["peak_mib"] = _peak_mib(call, options.device)
            timers[name] = Timer("call()", globals={"call": call}, num_threads=options.threads)
        except Exception as error:  # a kernel that the device lacks, or its memory: both are results
            message = " ".join(str(error).split())[:300]
            row.update(status="failed", reason=f"{type(error).__name__}: {message}", peak_mib=None)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for name in list(timers) * ROUNDS:
        times[name] += timers[name].blocked_autorange(min_run_time=options.seconds / ROUNDS).times
    for name, seconds in times.items():
        p20, p50, p80 = (float(value) for value in np.percentile(seconds, (20, 50, 80)) * 1e3)
        rows[name]["timing"] = Timing(p20, p50, p80, len(seconds))
    yield from (Row(**row) for row in rows.values())


def _ratio(upper: Row | None, lower: Row | None, of: Callable[[Row], float]) -> str:
    """A number only where both rows are right; else the fault."""
    for row in (upper, lower):
        if row is None or row.fault is not None:
            return "-" if row is None else str(row.fault)
    assert upper is not None and lower is not None
    return f"{of(upper) / of(lower):.2f}x"


def _p50(row: Row) -> float:
    assert row.timing is not None
    return row.timing.p50_ms


def _peak(row: Row) -> float:
    assert row.peak_mib is not None
    return row.peak_mib


METHOD = (
    "ms: time of one call after a warm-up, p50 (p20-p80), all variants in turns, float32 without TF32. x "
    "softmax: how many times faster than torch's fused scaled_dot_product_attention without local convolution. floor: "
    "the two matrix products and the convolution alone. MiB: peak memory beyond what stood before the call, and its "
    "ratio to softmax's. RMS error: the worst of output and gradients against a reference in float64, relative "
    "to its RMS; where it is too large, no ratio is given."
)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio_table(rows: Sequence[Row]) -> list[str]:
    """The Markdown of one group: a line for each size and variant."""
    found = {(row.size, row.variant): row for row in rows}
    body = []
    for row in sorted(rows, key=lambda row: row.size):
        softmax, floor = found.get((row.size, "softmax")), found.get((row.size, "floor"))
        cells = [f"{row.height} x {row.width} ({row.tokens})", row.variant]
        if row.timing is None or row.peak_mib is None:
            body.append([*cells, row.status, "-", "-", "-", "-", "-"])
            continue
        p20, p50, p80, peak = map(_number, (row.timing.p20_ms, row.timing.p50_ms, row.timing.p80_ms, row.peak_mib))
        ratios = _ratio(softmax, row, _p50), _ratio(row, floor, _p50), _ratio(row, softmax, _peak)
        error = "not finite" if row.parity_rms is None else f"{row.parity_rms:.1e}"
        error = error if row.parity_ok else f"RED: {error}, allowed {row.tolerance_rms:.1e}"
        body.append([*cells, f"{p50} ({p20}-{p80})", *ratios[:2], peak, ratios[2], error])
    head = ["size (N)", "variant", "ms", "x softmax", "x floor", "MiB", "x softmax's", "RMS error"]
    return list(markdown_table(head, body))


def benchmark_markdown(found: Benchmark) -> str:
    """Machine, method, a table for each group, and what was not measured."""
    model = f" {found.embed_dims} channels, {found.num_heads} heads, backbone of {found.depth} blocks"
    model += f"; detector {found.detector}." if found.detector else "."
    lines = ["# Latency and memory", "", f"Machine: {found.machine}.", "", METHOD + model]
    for (level, passes, dtype, batch), rows in found.groups().items():
        lines += ["", f"## {level}, {passes}, {dtype}, batch {batch}", "", *ratio_table(rows), ""]
        lines += [f"- {row.variant}, N = {row.tokens}: {row.status}: {row.reason}" for row in rows if row.reason]
    return "\n".join([*lines, "", f"Made by `{found.created_by}`, {found.created_at}.", ""])


def ratios_markdown(reports: Sequence[Benchmark]) -> str:
    """Of every size, how many times faster each variant is than softmax, and memory over softmax's."""
    names = [name for name in VARIANTS if name != "softmax"]
    body = []
    for (level, passes, dtype, batch), rows in ((key, rows) for one in reports for key, rows in one.groups().items()):
        found = {(row.size, row.variant): row for row in rows}
        for size in sorted({row.size for row in rows}):
            softmax, *others = (found.get((size, name)) for name in ("softmax", *names))
            memory = [_ratio(found.get((size, name)), softmax, _peak) for name in ("linear", "castling")]
            case = f"{level}, {passes}, {dtype}, batch {batch}, {size[1]} x {size[2]}"
            body.append([case, str(size[0]), *(_ratio(softmax, other, _p50) for other in others), *memory])
    head = ["times as fast as softmax", "N", *names, "linear: memory", "castling: memory"]
    machines = dict.fromkeys(f"Machine: {report.machine}." for report in reports)
    return "\n".join([*markdown_table(head, body), "", *machines, ""])


def write_plot(path: Path, found: Benchmark) -> None:
    """Median latency over tokens, a panel for each group."""
    groups = found.groups()
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.2, "legend.frameon": False}):
        figure = Figure(figsize=(4.8 * len(groups), 3.7), layout="constrained", dpi=110)
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (group, rows) in zip(panels, groups.items(), strict=True):
            for name, marker in zip(("softmax", "linear", "published", "castling"), "osD^", strict=True):
                good = sorted((row.tokens, _p50(row)) for row in rows if row.variant == name and row.fault is None)
                if good:
                    axes.plot(*zip(*good, strict=True), marker=marker, label=name)
            axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="p50 latency, ms")
            axes.set_title(", ".join(map(str, group)), fontsize=10)
            axes.legend()
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    size = int(height), int(width if separator else height)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected sides of at least 1")
    return size


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def some_of(name: str, choices: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=default, metavar="NAME", help=f"of {', '.join(choices)}"
        )

    some_of("levels", LEVELS, ["core", "block"])
    some_of("variants", list(VARIANTS), list(VARIANTS))
    some_of("passes", PASSES, PASSES)
    some_of("dtypes", list(TOLERANCES), ["float32"])
    sizes: dict[str, Any] = dict(nargs="+", type=_size, metavar="SIDE|HxW")
    parser.add_argument("--sizes", **sizes, default=[(16, 16), (32, 32), (64, 64)], help="maps of core and block")
    parser.add_argument("--image-sizes", **sizes, default=[(512, 512), (1024, 1024)], help="of backbone and detector")
    numbers = {"batch": 1, "threads": torch.get_num_threads(), "embed-dims": 384, "num-heads": 6, "depth": 12}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=_positive, metavar="N", default=number, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, metavar="S", default=3.0, help="of timing each variant of a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config-prefix", default=CONFIG[0], help="detector: PREFIX_{softmax,castling,linear}SUFFIX")
    parser.add_argument("--config-suffix", default=CONFIG[1], help="default: %(default)s")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder to write into")
    where.add_argument("--render", type=Path, metavar="FILE", help="a benchmark.json: render it again beside itself")
    args = parser.parse_args(arguments)
    try:
        if args.render:
            folder, found = args.render.parent, read_benchmark(args.render)
        else:
            folder = args.out
            folder.mkdir(parents=True, exist_ok=True)
            command = shlex.join(["tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
            found = measure(args, command)
            write_document(folder / "benchmark.json", found, schema=SCHEMA, field="benchmark")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    markdown = benchmark_markdown(found)
    write_text(folder / "benchmark.md", markdown)
    write_plot(folder / "benchmark.png", found)
    print(markdown)
    return int(any(row.status == "failed" or row.parity_ok is False for row in found.rows))
