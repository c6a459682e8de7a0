"""A report as Markdown, JSON and one HTML page that needs no other file. Rendered from the records alone."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from castling_det.files import write_text
from castling_det.report.records import (
    METRICS,
    Report,
    RunRecord,
    Spread,
    printable,
    summaries,
    unique,
    write_report_json,
)

if TYPE_CHECKING:  # matplotlib is loaded for the page alone
    from castling_det.report.figures import Row

RUN_COLUMNS = (*METRICS, "iterations", "training (h:m:s)", "checkpoint sha256")


def write_report(out_dir: Path, report: Report, pictures: Sequence[Row] = (), attention: Sequence[Any] = ()) -> None:
    """Writes `report.json`, `report.md` and `index.html` into `out_dir`, each atomically.

    The page shows `pictures`, the gallery of the report's comparison, and `attention`, those of tools/attention.py.
    """
    write_report_json(out_dir / "report.json", report)
    write_text(out_dir / "report.md", markdown(report))
    write_text(out_dir / "index.html", html_page(report, pictures, attention))


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, columns padded to one width, the first to the left and the others to the right."""
    cells = [[one_line(cell) for cell in row] for row in (head, *body)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    top, *rest = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return ["| " + " | ".join(row) + " |" for row in (top, rule, *rest)]


def one_line(text: str) -> str:
    """The text as one line of Markdown that can neither break a table nor be HTML."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def headline(report: Report, *, brief: bool = True) -> str:
    """The table with its units and the machine, without headings: to stand in another document."""
    text = "mAP in [0, 1]; ± is the sample standard deviation over seeds. GMACs are 10^9 multiply-adds of one image."
    text = one_line(" ".join(filter(None, (text, _interval_note(report), _latency_note(report)))))
    lines = [*markdown_table(*_table(report, brief)), "", *textwrap.wrap(text, 128), "", one_line(str(report.machine))]
    return "\n".join(lines) + "\n"


def markdown(report: Report) -> str:
    """The table, failed runs, every single run, how it was made."""
    lines = [one_line(f"# {report.deployed} against {report.baseline}"), "", one_line(f"Data: {report.dataset}."), ""]
    lines += [headline(report, brief=False).rstrip()]
    lines += [text for note in _notes(report) for text in ("", f"Note: {one_line(note)}")]
    if report.failed:
        lines += ["", "## Failed", "", *(f"- {one_line(line)}" for line in _failures(report))]
    body = [[run.name, *_run_cells(run)] for run in report.runs]
    lines += ["", "## Every run", "", *markdown_table(("run", "seed", "status", *RUN_COLUMNS), body)]
    created, *commands = map(_code, _commands(report))
    lines += ["", "## How it was made", "", f"- {created}, {report.created_at}", *(f"- {line}" for line in commands)]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """A code span, of two backticks where the text holds one itself."""
    line = printable(" ".join(text.split()))
    return f"`` {line.replace('``', '` `')} ``" if "`" in line else f"`{line}`"


def html_page(report: Report, pictures: Sequence[Row] = (), attention: Sequence[Any] = ()) -> str:
    """The page, whole. The template escapes every value; pictures and plots are data: addresses."""
    import jinja2

    from castling_det.report import figures

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        # Names as they are printed; markup comes from the template's own macros and is left as it is.
        finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
    )  # fmt: skip
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    head, rows = _table(report, brief=False)
    return template.render(
        report=report, head=head, rows=list(zip(summaries(report), rows, strict=True)), tiles=_tiles(report),
        failures=_failures(report), notes=_notes(report), table_notes=(_interval_note(report), _latency_note(report)),
        masked=next((run for run in report.runs if run.mask.kept_fraction), None), pictures=pictures,
        attention=attention, run_columns=RUN_COLUMNS, run_cells=_run_cells, commands=_commands(report),
        figures=figures, jpeg=_jpeg, svg=_svg,
    )  # fmt: skip


def _svg(drawing: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode("ascii")


def _jpeg(picture: Image.Image) -> str:
    """JPEG, since photographs as PNG make a page of tens of megabytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The four numbers that a reader came for, each with its text; unknown ones are left out."""
    by_name = {summary.name: summary for summary in summaries(report)}
    baseline, deployed = by_name[report.baseline], by_name[report.deployed]
    ours, theirs, tiles = deployed.first, baseline.first, []
    mAP, reference = deployed.spreads["mAP"], baseline.spreads["mAP"]
    if mAP is not None and reference is not None:
        tiles.append((mAP.text(), f"mAP of {deployed.name}; {baseline.name} {reference.text()}"))
    if (difference := deployed.differences["mAP"]) is not None:
        seeds = f", mean over {difference.seeds} seeds" if difference.seeds > 1 else ""
        interval = report.difference_of(deployed.name)
        spread = f"; {interval.confidence:.0%} {interval.low:+.3f} to {interval.high:+.3f}" if interval else ""
        tiles.append((f"{difference.mean:+.3f}", f"mAP of {deployed.name} minus {baseline.name}{seeds}{spread}"))
    if ours.gmacs is not None and theirs.gmacs:
        text = f"multiply-adds: {ours.gmacs:.3f} against {theirs.gmacs:.3f} GMACs"
        tiles.append((f"{ours.gmacs / theirs.gmacs - 1:+.0%}", text))
    if ours.latency and theirs.latency:
        times = ours.latency.p50_ms, theirs.latency.p50_ms
        tiles.append((f"{times[0] / times[1] - 1:+.0%}", f"latency p50: {times[0]:.1f} against {times[1]:.1f} ms"))
    return tiles


def _table(report: Report, brief: bool) -> tuple[list[str], list[list[str]]]:
    """Titles of the headline table, units in them, and its rows. `brief` leaves out details."""
    found = summaries(report)
    runs = [summary.first for summary in found]  # for all that does not depend on the seed
    latencies = [run.latency for run in runs]
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    failed = [len(s.runs) - s.seeds for s in found]
    columns = {"run": [s.name for s in found]}
    columns["seeds"] = [f"{s.seeds} (FAILED: {n})" if n else str(s.seeds) for s, n in zip(found, failed, strict=True)]
    columns["mAP"] = [_text(s.spreads["mAP"]) for s in found]
    columns[f"mAP - {report.baseline}"] = [
        "baseline" if s.name == report.baseline else _text(s.differences["mAP"], "+") for s in found
    ]
    if report.differences:
        intervals = [report.difference_of(s.name) for s in found]
        title = f"{report.differences[0].confidence:.0%} interval"
        columns[title] = [f"{d.low:+.3f} to {d.high:+.3f}" if d is not None else "-" for d in intervals]
    columns |= {name: [_text(s.spreads[name]) for s in found] for name in METRICS[1:]}
    columns["params (M)"] = [_number(run.params and run.params / 1e6, ".2f") for run in runs]
    columns["GMACs" + (" at {}x{}".format(*shape) if shape else "")] = [_number(run.gmacs, ".3f") for run in runs]
    columns["latency p50 (ms)"] = [_number(timed.p50_ms if timed else None, ".1f") for timed in latencies]
    columns["peak memory (MiB)"] = [_number(timed.peak_mib if timed else None, ".1f") for timed in latencies]
    columns["training (h:m:s)"] = [_duration(s.spreads["seconds"] and s.spreads["seconds"].mean) for s in found]
    details = {*METRICS[3:], "peak memory (MiB)", "training (h:m:s)"}
    for title in (*details, "latency p50 (ms)"):
        if (brief and title in details) or set(columns[title]) == {"-"}:
            del columns[title]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _text(spread: Spread | None, sign: str = "") -> str:
    return spread.text(sign) if spread is not None else "-"


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-"


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds is not None else "-"


def _interval_note(report: Report) -> str:
    """What the intervals are; empty without any."""
    if not report.differences:
        return ""
    first = report.differences[0]
    pairs = sorted({difference.pairs for difference in report.differences})
    mean = f", mean over {' or '.join(map(str, pairs))} seeds" if pairs != [1] else ""
    return (
        f"The {first.confidence:.0%} interval of the difference is a bootstrap over the {first.images} test images: "
        f"{first.resamples} draws with replacement (seed {first.bootstrap_seed}), both detectors on the same "
        f"draws{mean}. It covers the choice of images, not that of training seeds."
    )


def _latency_note(report: Report) -> str:
    """How the latencies were measured; empty without any."""
    timed = [run.latency for run in report.runs if run.latency is not None]
    kinds = unique("{}x{} pixels, {} threads, {}".format(*m.input_shape, m.threads, m.device) for m in timed)
    sources = unique(latency.source for latency in timed if latency.source is not None)
    lines = [f"Latency is that of one image: {'; '.join(kinds)}."] if timed else []
    lines += [f"From {'; '.join(sources)}."] if sources else []
    return " ".join(lines)


def _failures(report: Report) -> list[str]:
    """One line for each failed run: its name, seed and reason."""
    seeds = ["" if run.seed is None else f" (seed {run.seed})" for run in report.failed]
    return [f"{run.name}{seed}: FAILED: {run.reason}" for run, seed in zip(report.failed, seeds, strict=True)]


def _notes(report: Report) -> list[str]:
    """One line for each thing that is missing, with the names of the runs that lack it."""
    notes = unique(note for run in report.runs for note in run.notes)
    return [f"{', '.join(unique(run.name for run in report.runs if note in run.notes))}: {note}" for note in notes]


def _commands(report: Report) -> tuple[str, ...]:
    return unique([report.created_by, *(command for run in report.runs for command in run.commands)])


def _run_cells(run: RunRecord) -> list[str]:
    """Seed, status, and the cells below `RUN_COLUMNS`."""
    return [
        _number(run.seed, "d"),
        "ok" if run.ok else "FAILED",
        *(_number(run.metrics.get(name), ".3f") for name in METRICS),
        _number(run.iterations, "d"),
        _duration(run.train_seconds),
        (run.checkpoint_sha256 or "-")[:12],
    ]
