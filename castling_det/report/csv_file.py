"""A report as CSV: one row a run, failed ones too, for a spreadsheet or another program. Units stand in the names."""

from __future__ import annotations

import csv
import io

from castling_det.report.record import METRICS, Report, RunRecord

__all__ = ["csv_text"]


def csv_text(report: Report) -> str:
    """The table. An empty cell is a number that is not known; columns are the same for every report."""
    rows = [_row(report, run) for run in report.runs]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _row(report: Report, run: RunRecord) -> dict[str, object]:
    latency, difference = run.latency, report.difference_of(run.name)
    height, width = run.input_shape or (None, None)
    timed_height, timed_width = latency.input_shape if latency is not None else (None, None)
    return {
        "run": run.name,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "attention": run.attention,
        **{name: run.metrics.get(name) for name in METRICS},
        "metrics_source": run.metrics_source,
        "baseline": report.baseline,
        "mAP_minus_baseline_mean_over_seeds": difference and difference.value,
        "mAP_minus_baseline_low": difference and difference.low,
        "mAP_minus_baseline_high": difference and difference.high,
        "interval_confidence": difference and difference.confidence,
        "interval_resamples": difference and difference.resamples,
        "params": run.params,
        "gmacs": run.gmacs,
        "gmacs_input_height_px": height,
        "gmacs_input_width_px": width,
        "latency_p50_ms": latency and latency.p50_ms,
        "latency_input_height_px": timed_height,
        "latency_input_width_px": timed_width,
        "latency_threads": latency and latency.threads,
        "latency_device": latency and latency.device,
        "peak_memory_mib": latency and latency.peak_mib,
        "mask_empty_from_iteration": run.mask.empty_from,
        "iterations": run.iterations,
        "training_seconds": run.train_seconds,
        "checkpoint_sha256": run.checkpoint_sha256,
        "config": run.config,
    }
