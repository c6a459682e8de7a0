"""The sections of the HTML page below its table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from castling_det.report import detail_plots, plots
from castling_det.report.colors import BOXES
from castling_det.report.gallery import Row, data_uri
from castling_det.report.record import METRICS, Report, RunRecord
from castling_det.report.table import duration, machine_line

__all__ = ["costs", "curves", "every_run", "masks", "pictures_of", "precision", "provenance", "speed"]

_CATEGORIES = 8
"""Categories with a plot of their own, at most."""


def costs(report: Report) -> str:
    """What accuracy costs, and where the cost is."""
    accuracy = plots.accuracy_over_cost(report)
    latency = plots.accuracy_over_latency(report)
    kinds = plots.cost_by_kind(report)
    return _section(
        "Accuracy and cost",
        [
            _figure("mAP over multiply-adds", accuracy, "Large mark: mean of a run's seeds. Small mark: one seed."),
            _figure("mAP over latency", latency, "Marks as beside; latency as the table says."),
            _figure("Where the multiply-adds are", kinds, "The baseline and the deployed run, one image."),
        ],
    )


def speed(report: Report) -> str:
    """Latency over the size of the input, one plot a table of a benchmark."""
    figures = []
    for found in report.speed:
        machine = found.machine
        place = f"{machine.cpu}, {machine.threads} threads" if machine.device == "cpu" else machine.device
        caption = (
            f"{found.dtype}, batch {found.batch}, {place}; bands from p20 to p80; {found.crossover_note}. "
            f"Made by {found.created_by}."
        )
        figures.append(
            _figure(f"{found.level}, {found.passes}", detail_plots.latency_over_size(report, found), caption)
        )
    return _section("Latency over the size of the input", figures)


def precision(report: Report) -> str:
    """Precision over recall by category, those first in which the deployed runs lose most."""
    ordered = detail_plots.categories_by_difference(report)
    figures = [
        _figure(category, detail_plots.precision_over_recall(report, category), "One line a seed.")
        for category in ordered[:_CATEGORIES]
    ]
    text = (
        f"At IoU 0.50; {len(figures)} of {len(ordered)} categories, those first in which {report.deployed} loses most "
        f"against {report.baseline}. AP50 is the mean over seeds."
    )
    return _section("Precision and recall by category", figures, text if figures else "")


def curves(report: Report) -> str:
    """Loss and validation during training."""
    loss = plots.training_curve(report, "loss", validation=False, label="loss", log=True)
    validation = plots.training_curve(report, "mAP", validation=True, label="validation mAP, in [0, 1]")
    return _section(
        "Training",
        [
            _figure("Loss", loss, "One line a seed; logarithmic."),
            _figure("Accuracy on the validation images", validation, "One line a seed."),
        ],
        "A castling run is validated as it will be deployed, without its softmax branch." if validation else "",
    )


def masks(report: Report) -> str:
    """Mask occupancy of the first run that logged it: seeds of one run follow the same schedule."""
    run = next((run for run in report.runs if run.mask.kept_fraction), None)
    if run is None:
        return ""
    seed = "" if run.seed is None else f", seed {run.seed}"
    empty = run.mask.empty_from
    text = (
        f"From iteration {empty} on no layer keeps anything at any logged iteration: the rest of training sees the "
        "network that is deployed."
        if empty is not None
        else "The mask is not empty at the last logged iteration: conversion changes this network."
    )
    fraction = plots.mask_occupancy(run, "kept_fraction", label="kept fraction, in [0, 1]")
    mass = plots.mask_occupancy(run, "kept_mass", label="kept probability, in [0, 1]")
    return _section(
        "How the softmax branch vanishes",
        [
            _figure("Share of the attention weights above the threshold", fraction, ""),
            _figure("Share of the probability that they hold", mass, ""),
        ],
        f"{run.name}{seed}. {text}",
    )


def pictures_of(report: Report, pictures: Sequence[Row]) -> str:
    """The gallery, with what its colours mean."""
    title, comparison = "Where they differ most", report.comparison
    if comparison is None or not pictures:
        return _section(
            title,
            [],
            f"No pictures: {report.baseline} and {report.deployed} have no predictions of one seed. "
            "Run tools/test.py with test_evaluator.outfile_prefix=TEST_DIR/predictions.",
        )
    seed = "" if comparison.seed is None else f", seed {comparison.seed}"
    text = (
        f"{len(pictures)} of {len(comparison.images)} images, the largest differences in F1 between "
        f"{comparison.baseline} and {comparison.deployed} first{seed}. Shown are boxes with a score of at least "
        f"{comparison.score_threshold:g}; one is right if its IoU with an annotation that no better box has taken is "
        f"at least {comparison.iou:g}. Boxes on annotations that are not evaluated count neither way and are left out."
    )
    legend = {
        "truth": "annotated",
        "crowd": "annotated, not evaluated",
        "right": "found, right",
        "wrong": "found, wrong",
        "missed": "missed",
    }
    key = "".join(f"<span>{_swatch(name)}{label}</span>" for name, label in legend.items())
    rows = "".join(_picture_row(comparison.baseline, comparison.deployed, row) for row in pictures)
    return f'{_section(title, [], text)}<div class="key">{key}</div>{rows}'


def every_run(report: Report) -> str:
    """A table with a row for each run, failed ones with their reason."""
    columns = ("run", "seed", *METRICS, "iterations", "training", "checkpoint sha256")
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = "".join(_run_row(run, len(columns)) for run in report.runs)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Every run</h2><div class="scroll">{table}</div>'


def provenance(report: Report) -> str:
    """The commands, the machine and the time."""
    commands = [report.created_by, *dict.fromkeys(command for run in report.runs for command in run.commands)]
    listed = "".join(f"<pre><code>{escape(command)}</code></pre>" for command in commands)
    line = f"{machine_line(report)}. Report made {report.created_at}."
    return f"<h2>How it was made</h2>{listed}<footer>{escape(line)}</footer>"


def _swatch(name: str) -> str:
    dashed = ' class="dashed"' if name in ("missed", "crowd") else ""
    return f'<i{dashed} style="border-color:{BOXES["truth" if name == "crowd" else name]}"></i>'


def _picture_row(baseline: str, deployed: str, row: Row) -> str:
    image = row.image
    panels = [("ground truth", row.truth, f"{image.baseline.tp + image.baseline.fn} objects")]
    found = ((baseline, row.baseline, image.baseline), (deployed, row.deployed, image.deployed))
    for name, picture, counts in found:
        text = f"{counts.tp} right, {counts.fp} wrong, {counts.fn} missed; F1 {counts.f1:.2f}"
        panels.append((name, picture, text))
    figures = "".join(
        f'<figure><img src="{data_uri(picture)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(f"{image.file_name}: {name}")}"><figcaption><b>{escape(name)}</b>: {text}</figcaption></figure>'
        for name, picture, text in panels
    )
    side = "above" if image.f1_difference > 0 else "below"
    change = f"{abs(image.f1_difference):.2f} {side} {baseline}" if image.f1_difference else f"as of {baseline}"
    title = f"{image.file_name}: F1 of {deployed} {change}"
    return f'<article class="image"><h3>{escape(title)}</h3><div class="trio">{figures}</div></article>'


def _run_row(run: RunRecord, columns: int) -> str:
    first = f"<td>{escape(run.name)}</td><td>{'-' if run.seed is None else run.seed}</td>"
    if not run.ok:
        reason = f"FAILED: {escape(run.reason or '')}"
        return f'<tr>{first}<td class="reason bad" colspan="{columns - 2}">{reason}</td></tr>'
    numbers = [run.metrics.get(name) for name in METRICS]
    cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
    cells.append("-" if run.iterations is None else str(run.iterations))
    cells.append("-" if run.train_seconds is None else duration(run.train_seconds))
    cells.append(f"<code>{run.checkpoint_sha256[:12]}</code>" if run.checkpoint_sha256 else "-")
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _figure(title: str, drawing: str | None, caption: str) -> str:
    if drawing is None:
        return ""
    return f"<figure><b>{escape(title)}</b>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(title: str, figures: Sequence[str], text: str = "") -> str:
    """Empty if there is nothing to show."""
    shown = [figure for figure in figures if figure]
    if not shown and not text:
        return ""
    body = f"<p>{escape(text)}</p>" if text else ""
    return f"<h2>{escape(title)}</h2>{body}" + (f'<div class="plots">{"".join(shown)}</div>' if shown else "")
