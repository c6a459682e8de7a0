"""Wall time of a call, and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from castling_det.analysis.benchmark.record import Timing

__all__ = ["call_seconds", "peak_memory", "settle_allocator", "timing_of"]

_SETTLING_BYTES = 31 << 20
"""Just under the largest block from which glibc's malloc learns."""


def settle_allocator() -> None:
    """Brings malloc into the state in which a network's larger tensors leave it.

    glibc hands freed memory back to the system at once, and every page of it is faulted in again, until it has seen
    one large block freed. A core measured alone would pay for that; inside a detector it does not.
    """
    torch.empty(_SETTLING_BYTES, dtype=torch.uint8)


def call_seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call in seconds, until the device has finished it."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def timing_of(seconds: Sequence[float]) -> Timing:
    """Percentiles of `seconds`, in milliseconds."""
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80)) * 1e3
    return Timing(float(p20), float(p50), float(p80), len(seconds))


def peak_memory(call: Callable[[], object], device: str) -> float:
    """The most memory, in MiB, that stands during `call` beyond what stood before it; its result is part of it."""
    peak = _peak_bytes_cuda(call) if device == "cuda" else _peak_bytes_cpu(call)
    return peak / 2**20


def _peak_bytes_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_bytes_cpu(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    standing = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        standing += event.nbytes()
        peak = max(peak, standing)
    return peak


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
