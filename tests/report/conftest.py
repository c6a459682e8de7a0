"""A report of a demo-like set of runs, read from work dirs once for all tests."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from castling_det.report.build import build_report, comparison_pictures
from castling_det.report.evaluation import Annotations
from castling_det.report.figures import Row
from castling_det.report.records import Latency, Report
from castling_det.report.render import html_page
from castling_det.report.runs import RunSpec
from tests.report.samples import write_data, write_demo


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
    timed = (("softmax", 0.41), ("castling", 0.128), ("deploy", 0.128))
    report = build_report(
        specs, baseline="softmax", deployed="deploy", annotations=data, created_by="tools/report.py --x",
        latency={name: Latency(p50, 2, "cpu", (128, 128), 128.0) for name, p50 in timed}, resamples=200,
    )  # fmt: skip
    return Demo(report, comparison_pictures(report, data, images, count=3), specs)


@pytest.fixture(scope="session")
def demo_page(demo: Demo) -> str:
    """The HTML page of `demo`, with its pictures."""
    return html_page(demo.report, demo.pictures)


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Tool = Callable[..., Result]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Runs a file of tools/ as `python tools/NAME` does, in this process: starting another takes seconds."""

    def run(name: str, *arguments: object) -> Result:
        path = Path(__file__).parents[2] / "tools" / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *capsys.readouterr())

    return run
