"""Measures every variant of every case and makes the record."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TypeVar

import torch

from castling_det.analysis.benchmark.measure import call_seconds, peak_memory, settle_allocator, timing_of
from castling_det.analysis.benchmark.models import detector_stride, tokens_of
from castling_det.analysis.benchmark.options import BenchmarkOptions, Case
from castling_det.analysis.benchmark.parity import Parity, check_parity, tolerance_for, why_no_gradients
from castling_det.analysis.benchmark.record import BenchmarkReport, BenchmarkRow
from castling_det.analysis.benchmark.subject import Subject, build_subject
from castling_det.analysis.benchmark.variants import VARIANTS, Variant
from castling_det.report.records import this_machine

__all__ = ["run_benchmark"]

Progress = Callable[[int, int, str], None]
ResultT = TypeVar("ResultT")


def run_benchmark(
    options: BenchmarkOptions,
    *,
    created_by: str,
    table: Mapping[str, Variant] = VARIANTS,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measures one case after another.

    Args:
        options: what to measure.
        created_by: the command, for the record.
        table: what the names of variants stand for.
        progress: called with cases done, cases in all and what comes next.

    Raises:
        ValueError: the detector's configs are not what they should be. Failures while measuring are rows.
    """
    has_detector = "detector" in options.levels
    stride = detector_stride(options) if has_detector else None
    cases = list(options.cases())
    rows: list[BenchmarkRow] = []
    settle_allocator()
    with _full_float32():
        for index, case in enumerate(cases):
            if progress is not None:
                progress(index, len(cases), f"{case.level} {case.height} x {case.width} {case.passes} {case.dtype}")
            rows += _measured(case, tokens_of(case, stride), options, table)
    machine = this_machine()
    return BenchmarkReport(
        machine=machine if options.device == "cuda" else dataclasses.replace(machine, device="cpu"),
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        embed_dims=options.embed_dims,
        num_heads=options.num_heads,
        depth=options.depth,
        detector=options.config_file("*") if has_detector else None,
        rows=tuple(rows),
    )


class _Trial:
    """One variant on its way through a case; after the first failure its further steps do nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status = "ok"
        self.reason: str | None = None
        self.subject: Subject | None = None
        self.parity: Parity | None = None
        self.seconds: list[float] = []
        self.peak_mib: float | None = None

    def stop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.subject = status, reason, None

    def attempt(self, step: str, action: Callable[[], ResultT]) -> ResultT | None:
        if self.status != "ok":
            return None
        try:
            return action()
        except Exception as error:  # A kernel that the device lacks, its memory, a compiler: all are results.
            message = " ".join(str(error).split())[:300]
            self.stop("failed", f"{step}: {type(error).__name__}: {message}")
            return None

    def call(self, step: str, action: Callable[[Subject], ResultT]) -> ResultT | None:
        """`action` on the subject, without gradients of an earlier call."""

        def on_subject() -> ResultT:
            assert self.subject is not None
            self.subject.reset()
            return action(self.subject)

        return self.attempt(step, on_subject)


def _measured(case: Case, tokens: int, options: BenchmarkOptions, table: Mapping[str, Variant]) -> list[BenchmarkRow]:
    trials = [
        _Trial(name)
        for name in options.variants
        if case.level in table[name].levels and case.passes in table[name].passes
    ]
    for trial in trials:
        _prepare(trial, table[trial.name], case, tokens, options)
    for _ in range(options.warmup):
        for trial in trials:
            trial.call("warm-up", Subject.__call__)
    _time(trials, options)
    for trial in trials:
        trial.peak_mib = trial.call("memory", lambda subject: peak_memory(subject, options.device))
    rows = [_row(trial, case, tokens) for trial in trials]
    del trials
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _prepare(trial: _Trial, variant: Variant, case: Case, tokens: int, options: BenchmarkOptions) -> None:
    """Builds and compares."""
    if variant.max_tokens is not None and tokens > variant.max_tokens:
        trial.stop("skipped", f"{trial.name} is measured up to N = {variant.max_tokens}")
        return
    trial.subject = trial.attempt("build", lambda: build_subject(case, trial.name, variant, options))
    tolerance = tolerance_for(case, tokens, masked=variant.masked)
    reason = why_no_gradients(tokens, level=case.level, quadratic=variant.quadratic)
    trial.parity = trial.call("parity", lambda subject: check_parity(subject, tolerance, why_no_gradients=reason))


def _time(trials: Sequence[_Trial], options: BenchmarkOptions) -> None:
    """Rounds of a warm call of each variant: what else the machine does falls on all of them."""
    # Shuffled, so that no variant always follows a certain other one.
    shuffled, order = list(trials), random.Random(0)
    start = time.perf_counter()
    for _ in range(options.repeats):
        order.shuffle(shuffled)
        for trial in shuffled:
            # Caches and the allocator's pages are its own once more, as they are in a loop over images.
            trial.call("timing", Subject.__call__)
            seconds = trial.call("timing", lambda subject: call_seconds(subject, options.device))
            if seconds is not None:
                trial.seconds.append(seconds)
        if time.perf_counter() - start >= options.max_seconds:
            break


def _row(trial: _Trial, case: Case, tokens: int) -> BenchmarkRow:
    parity = trial.parity
    return BenchmarkRow(
        level=case.level,
        variant=trial.name,
        passes=case.passes,
        dtype=case.dtype,
        batch=case.batch,
        height=case.height,
        width=case.width,
        tokens=tokens,
        status=trial.status,
        reason=trial.reason,
        timing=timing_of(trial.seconds) if trial.status == "ok" else None,
        peak_mib=trial.peak_mib,
        parity_rms=_finite(parity.rms) if parity else None,
        parity_max=_finite(parity.maximum) if parity else None,
        parity_ok=parity.ok if parity else None,
        tolerance_rms=parity.tolerance.rms if parity else None,
        tolerance_max=parity.tolerance.maximum if parity else None,
        compared=parity.compared if parity else None,
    )


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions on CUDA in float32, as torch's matrix products are by default, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
