"""A report of a demo-like set of runs, read from work dirs once for all tests."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from castling_det.report import Annotations, RunSpec, build_report, comparison_pictures, html_page
from castling_det.report.gallery import Row
from castling_det.report.record import Report
from tests.report.samples import write_benchmark, write_data, write_demo


class Demo(NamedTuple):
    report: Report
    pictures: list[Row]
    specs: list[RunSpec]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    annotations, images = write_data(root)
    specs = [RunSpec.parse(run) for run in write_demo(root / "runs", annotations)]
    data = Annotations(annotations, description="noise & <boxes>")
    report = build_report(
        specs, baseline="softmax", deployed="deploy", annotations=data, created_by="tools/report.py --x",
        benchmarks=[write_benchmark(root / "benchmark")], resamples=200,
    )  # fmt: skip
    return Demo(report, comparison_pictures(report, specs, data, images, count=3), specs)


@pytest.fixture(scope="session")
def demo_page(demo: Demo) -> str:
    """The HTML page of `demo`, with its pictures."""
    return html_page(demo.report, demo.pictures)
