"""Small records, made by hand."""

from __future__ import annotations

from castling_det.report.record import Machine, Report, RunRecord

MACHINE = Machine(torch="2.11.0", device="cpu", cpu="a CPU", threads=2, python="3.11.7", commit=None)


def make_report(*runs: RunRecord) -> Report:
    """`runs` compared with `softmax`, of which `deploy` is shipped."""
    return Report("softmax", "deploy", "data", "command", "now", MACHINE, runs)


def make_run(name: str, seed: int | None, mAP: float | None) -> RunRecord:
    """A run with two metrics, or a failed one where `mAP` is None."""
    if mAP is None:
        return RunRecord(name, "failed", reason="it | broke\nbadly <here>", seed=seed)
    return RunRecord(name, "ok", seed=seed, metrics={"mAP": mAP, "mAP50": 2 * mAP})
