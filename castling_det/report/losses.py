"""How low the training losses end, beside the baseline's of the same seed.

Runs of one seed see the same images in the same order, so that most of the noise of a loss is the same in both: it
tells attentions apart that the mAP of a small test set does not. It says nothing about overfitting, and it compares
nothing but runs whose losses are the same sum.
"""

from __future__ import annotations

import statistics

from castling_det.report.markdown_table import markdown_table
from castling_det.report.record import Report, RunRecord
from castling_det.report.table import paired_difference, spread_of

__all__ = ["final_loss", "loss_table"]

_LAST_PART = 0.25


def final_loss(run: RunRecord) -> float | None:
    """The mean of the loss logged in the last quarter of a training; None where it is missing or not finite."""
    series = run.scalars.get("loss")
    if series is None or not series.steps:
        return None
    begin = (1 - _LAST_PART) * series.steps[-1]
    values = [value for step, value in zip(series.steps, series.values, strict=True) if step > begin]
    finite = [value for value in values if value is not None]
    return statistics.mean(finite) if len(finite) == len(values) else None


def loss_table(report: Report) -> str:
    """Markdown: a row a name, the mean over its seeds, and the difference from the baseline, paired by seed."""
    baseline = [run for run in report.runs_named(report.baseline) if run.ok]
    body = []
    for name in report.names:
        runs = [run for run in report.runs_named(name) if run.ok]
        mean = spread_of([final_loss(run) for run in runs])
        difference = paired_difference(runs, baseline, final_loss) if name != report.baseline else None
        text = difference.text(sign="+") if difference else "-"
        body.append(
            [name, str(len(runs)), mean.text() if mean else "-", "baseline" if name == report.baseline else text]
        )
    return "\n".join(markdown_table(("run", "seeds", "loss", f"loss - {report.baseline}"), body)) + "\n"
