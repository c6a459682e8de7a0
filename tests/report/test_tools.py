"""The two command lines, as a user calls them."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from castling_det.report import RunSpec
from castling_det.report.record import read_report
from tests.report.samples import write_benchmark, write_data, write_demo, write_test

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Tool = Callable[..., Result]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Runs a file of tools/ as `python tools/NAME` does, in this process: starting another takes seconds."""

    def run(name: str, *arguments: str) -> Result:
        path = ROOT / "tools" / name
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *capsys.readouterr())

    return run


def test_report(tool: Tool, tmp_path: Path) -> None:
    annotations, images = write_data(tmp_path)
    runs = write_demo(tmp_path / "runs", annotations, seeds=1)
    arguments = [part for run in runs for part in ("--run", run)]
    arguments += [
        "--baseline",
        "softmax",
        "--ann",
        str(annotations),
        "--images",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--strip",
        str(tmp_path / "strip.png"),
        "--benchmark",
        str(write_benchmark(tmp_path / "benchmark")),
    ]
    result = tool("report.py", *arguments, "--pictures", "2", "--score", "0.4", "--resamples", "20")
    assert result.returncode == 0, result.stderr
    assert "| deploy" in result.stdout and "index.html" in result.stdout
    report = read_report(tmp_path / "out" / "report.json")
    assert report.deployed == "deploy" and report.comparison is not None
    assert report.comparison.score_threshold == 0.4
    assert report.created_by.startswith("tools/report.py --run softmax=")
    assert report.differences[0].resamples == 20 and report.runs[2].latency is not None and len(report.speed) == 2
    assert (tmp_path / "out" / "report.csv").read_text().count("\n") == 4
    assert (tmp_path / "out" / "index.html").read_text().count("<img ") == 6
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width > 3 * 512 and picture.height > 512 - 1
    arguments += ["--resamples", "0"]
    failing = tool("report.py", *arguments, "--run", f"linear={tmp_path / 'nowhere'}", "--deployed", "deploy")
    assert failing.returncode == 1, "a failed run is in the report and in the exit code"
    assert "linear: FAILED" in failing.stdout
    assert len(read_report(tmp_path / "out" / "report.json").failed) == 1
    wrong = tool("report.py", *arguments, "--benchmark", str(annotations))
    assert wrong.returncode == 2 and "val.json: schema=None: expected 'castling_det.benchmark" in wrong.stderr
    wrong = tool("report.py", *arguments, "--baseline", "none")
    assert wrong.returncode == 2 and "baseline='none': expected the name of a run" in wrong.stderr


def test_complexity(tool: Tool, tmp_path: Path) -> None:
    write_test(tmp_path, mAP=0.1)
    config = str(next(tmp_path.glob("*/vis_data/config.py")))
    out = tmp_path / "out.json"
    shape = ("--shape", "64", "80", "--json", str(out))
    softmax = tool("complexity.py", config, *shape)
    assert softmax.returncode == 0, softmax.stderr
    assert "64 x 80 pixels (height x width) padded to 64 x 96" in softmax.stdout
    assert "attention" in softmax.stdout and "gmacs" in softmax.stdout
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * (4 * 6) ** 2 * 32
    linear = tool("complexity.py", config, *shape, "--cfg-options", "model.backbone.attention=linear")
    assert linear.returncode == 0
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * 24 * 32 * 16
    missing = tool("complexity.py", str(tmp_path / "no.py"), "--shape", "64", "64")
    assert missing.returncode == 1 and "no.py: no such file" in missing.stderr


def test_a_run_argument() -> None:
    assert RunSpec.parse("a=b/c") == RunSpec("a", Path("b/c"))
    spec = RunSpec.parse("a=b,test=t,train=s,config=c.py,checkpoint=x.pth,seed=3")
    assert spec == RunSpec("a", Path("b"), Path("t"), Path("s"), Path("c.py"), Path("x.pth"), 3)
    assert RunSpec.parse("a=b/x.pth") == RunSpec("a", Path("b"), checkpoint=Path("b/x.pth"))
    assert RunSpec.parse("a=b/p.json,seed=1") == RunSpec("a", None, predictions=Path("b/p.json"), seed=1)
    assert RunSpec.parse("a=b").test == Path("b/test")


@pytest.mark.parametrize(
    "text",
    ["a", "=b", "a=", "a=b,tests=t", "a=b,test", "a=b,test=", "a=b,seed=x", "a=b,seed=1,seed=2", "a=b.pth,checkpoint=c"]
)
def test_a_wrong_run_argument_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--run"):
        RunSpec.parse(text)
