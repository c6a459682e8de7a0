"""Writes a report as JSON, Markdown, CSV and one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from castling_det.files import write_text
from castling_det.report import sections
from castling_det.report.attention import attention_section
from castling_det.report.attention_maps import AttentionPicture
from castling_det.report.colors import as_css_variables, run_color, style_sheet
from castling_det.report.csv_file import csv_text
from castling_det.report.gallery import Row
from castling_det.report.markdown import markdown
from castling_det.report.record import Report, write_report_json
from castling_det.report.style import CSS
from castling_det.report.table import (
    Summary,
    failures,
    headline_cells,
    headline_columns,
    interval_note,
    latency_note,
    notes,
    summaries,
)

__all__ = ["html_page", "write_report"]


def write_report(
    out_dir: Path, report: Report, pictures: Sequence[Row] = (), attention: Sequence[AttentionPicture] = ()
) -> None:
    """Writes `report.json`, `report.md`, `report.csv` and `index.html` into `out_dir`, each atomically.

    Args:
        out_dir: made if it is not there.
        report: the record.
        pictures: the gallery of the report's comparison.
        attention: pictures of tools/attention.py.
    """
    write_report_json(out_dir / "report.json", report)
    write_text(out_dir / "report.md", markdown(report))
    write_text(out_dir / "report.csv", csv_text(report))
    write_text(out_dir / "index.html", html_page(report, pictures, attention))


def html_page(
    report: Report, pictures: Sequence[Row] = (), attention: Sequence[AttentionPicture] = ()
) -> str:
    """The page, whole."""
    title = f"{report.deployed} against {report.baseline}"
    css = CSS.replace("LIGHT", style_sheet(dark=False)).replace("DARK", style_sheet(dark=True))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(report.dataset)}</p>',
        _tiles(report),
        *(f'<p class="bad">{escape(line)}</p>' for line in failures(report)),
        *(f'<p class="soft">{escape(line)}</p>' for line in notes(report)),
        _headline(report),
        sections.costs(report),
        sections.speed(report),
        sections.precision(report),
        sections.curves(report),
        sections.masks(report),
        sections.pictures_of(report, pictures),
        attention_section(attention),
        sections.every_run(report),
        sections.provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _tiles(report: Report) -> str:
    """The four numbers that a reader came for; those that are not there are left out."""
    by_name = {summary.name: summary for summary in summaries(report)}
    baseline, deployed = by_name[report.baseline], by_name[report.deployed]
    tiles = []
    if "mAP" in deployed.metrics and "mAP" in baseline.metrics:
        ours, theirs = deployed.metrics["mAP"], baseline.metrics["mAP"]
        tiles.append((ours.text(), f"mAP of {deployed.name}; {baseline.name} {theirs.text()}"))
    if deployed.difference is not None:
        seeds = f", mean over {deployed.difference.count} seeds" if deployed.difference.count > 1 else ""
        interval = report.difference_of(deployed.name)
        spread = f"; {interval.confidence:.0%} {interval.low:+.3f} to {interval.high:+.3f}" if interval else ""
        text = f"mAP of {deployed.name} minus {baseline.name}{seeds}{spread}"
        tiles.append((f"{deployed.difference.mean:+.3f}", text))
    ours_cost, theirs_cost = deployed.first.gmacs, baseline.first.gmacs
    if ours_cost is not None and theirs_cost:
        change = ours_cost / theirs_cost - 1
        tiles.append((f"{change:+.0%}", f"multiply-adds: {ours_cost:.3f} against {theirs_cost:.3f} GMACs"))
    ours_time, theirs_time = deployed.first.latency, baseline.first.latency
    if ours_time is not None and theirs_time is not None:
        text = f"latency p50: {ours_time.p50_ms:.1f} against {theirs_time.p50_ms:.1f} ms"
        tiles.append((f"{ours_time.p50_ms / theirs_time.p50_ms - 1:+.0%}", text))
    cells = "".join(
        f'<div class="tile"><b>{escape(number)}</b><span>{escape(text)}</span></div>' for number, text in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _headline(report: Report) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in headline_columns(report))
    rows = "".join(_headline_row(report, summary) for summary in summaries(report))
    note = (
        "mAP is COCO's, over IoU 0.50 to 0.95, in [0, 1]. ± is the sample standard deviation over seeds, below it the "
        "range. Differences are paired by seed. GMACs are 10<sup>9</sup> multiply-adds of one image, "
        "counted in closed form with softmax attention included. "
        + escape(" ".join(filter(None, (interval_note(report), latency_note(report)))))
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="soft">{note}</p>'
    )


def _headline_row(report: Report, summary: Summary) -> str:
    name, *cells = (_narrow(cell) for cell in headline_cells(report, summary))
    spread = summary.metrics.get("mAP")
    if spread is not None and spread.extremes:
        cells[1] += f"<small>{spread.extremes}</small>"
    color = as_css_variables(run_color(summary.name, report.names))
    first = f'<td><span class="dot" style="background:{color}"></span>{name}</td>'
    css = ' class="deployed"' if summary.name == report.deployed else ""
    return f"<tr{css}>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _narrow(cell: str) -> str:
    """The spread, or the end of an interval, below the number, so that every column finds room."""
    for word in (" ± ", " to "):
        first, found, second = escape(cell).partition(word)
        if found:
            return f"{first}<small>{word.strip()} {second}</small>"
    return escape(cell)
