"""Builds the comparison of a set of runs from their work dirs, and renders it. Nothing is measured here."""

from castling_det.analysis.report.attention import read_attention
from castling_det.analysis.report.build import build_report, comparison_pictures, read_latency
from castling_det.analysis.report.compare import Annotations
from castling_det.analysis.report.gallery import strip
from castling_det.analysis.report.losses import final_loss, loss_table
from castling_det.analysis.report.markdown import headline, markdown
from castling_det.analysis.report.pages import html_page, write_report
from castling_det.analysis.report.runs import build_run
from castling_det.analysis.report.spec import RunSpec

__all__ = [
    "Annotations",
    "RunSpec",
    "build_report",
    "build_run",
    "comparison_pictures",
    "final_loss",
    "headline",
    "html_page",
    "loss_table",
    "markdown",
    "read_attention",
    "read_latency",
    "strip",
    "write_report",
]
