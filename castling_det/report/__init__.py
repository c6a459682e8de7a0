"""Builds the comparison of a set of runs from their work dirs, and renders it. Nothing is measured here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castling_det.report.attention import read_attention
    from castling_det.report.build import build_report, comparison_pictures, read_latency
    from castling_det.report.compare import Annotations
    from castling_det.report.gallery import strip
    from castling_det.report.losses import final_loss, loss_table
    from castling_det.report.markdown import headline, markdown
    from castling_det.report.pages import html_page, write_report
    from castling_det.report.runs import build_run
    from castling_det.report.spec import RunSpec

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

_HOME = {
    "Annotations": "castling_det.report.compare",
    "RunSpec": "castling_det.report.spec",
    "build_report": "castling_det.report.build",
    "build_run": "castling_det.report.runs",
    "comparison_pictures": "castling_det.report.build",
    "final_loss": "castling_det.report.losses",
    "headline": "castling_det.report.markdown",
    "html_page": "castling_det.report.pages",
    "loss_table": "castling_det.report.losses",
    "markdown": "castling_det.report.markdown",
    "read_attention": "castling_det.report.attention",
    "read_latency": "castling_det.report.build",
    "strip": "castling_det.report.gallery",
    "write_report": "castling_det.report.pages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
