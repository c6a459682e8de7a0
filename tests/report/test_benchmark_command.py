"""`tools/benchmark.py`, at sizes of a few tokens: what it measures, writes, renders and refuses."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from castling_det.analysis.benchmark import PASSES, read_benchmark, write_benchmark
from tests.report.test_benchmark import GREEN, RED, SKIPPED, report_of

ROOT = Path(__file__).parents[2]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs tools/benchmark.py in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        path = ROOT / "tools" / "benchmark.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_command(command: Command, tmp_path: Path) -> None:
    code, text, _ = command(
        "--levels", "core", "block", "--sizes", "4", "7", "--embed-dims", "16", "--num-heads", "2", "--repeats", "2",
        "--warmup", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path),
    )  # fmt: skip
    report = read_benchmark(tmp_path / "benchmark.json")
    assert code == 0, [row for row in report.rows if not row.ok or row.parity_red]
    assert len(report.rows) == 2 * (7 + 6 + 6 + 6), "four tables of two sizes; the floor in one of them"
    assert report.machine.threads == 1 and {row.tokens for row in report.rows} == {16, 49}
    assert all(row.timing is not None and row.timing.repeats == 2 for row in report.rows)
    assert all(row.peak_mib is not None and row.peak_mib > 0 for row in report.rows)
    assert all("gradient of the input" in (row.compared or "") for row in report.rows if row.passes == PASSES[1])
    assert "## block, forward+backward, float32, batch 1" in text and "x floor" in text and "Crossover: " in text
    assert text.rstrip() == (tmp_path / "benchmark.md").read_text().rstrip()
    picture = (tmp_path / "benchmark.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 1e6
    (tmp_path / "benchmark.md").unlink()
    code, again, _ = command("--render", str(tmp_path / "benchmark.json"))
    assert code == 0 and again == text and (tmp_path / "benchmark.md").is_file()


def test_backbone_and_detector(command: Command, tmp_path: Path) -> None:
    prefix = ROOT / "configs/castling_vit/gfl_castling-vit-nano"
    code, text, _ = command(
        "--levels", "backbone", "detector", "--image-sizes", "32x64", "--embed-dims", "16", "--num-heads", "2",
        "--depth", "2", "--repeats", "1", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path),
        "--variants", "softmax", "linear", "castling", "--config-prefix", str(prefix),
    )  # fmt: skip
    report = read_benchmark(tmp_path / "benchmark.json")
    assert code == 0, [row for row in report.rows if not row.ok or row.parity_red]
    assert {(row.level, row.tokens) for row in report.rows} == {("backbone", 8), ("detector", 32)}
    gradients = {row.compared for row in report.rows if row.level == "detector" and row.passes == PASSES[1]}
    assert gradients == {"output, gradient of the input, gradient of detector.backbone.blocks.0.attn.qkv.weight"}
    assert "32 x 64 (32)" in text


def test_a_red_or_failed_row_is_in_the_exit_code(command: Command, tmp_path: Path) -> None:
    write_benchmark(tmp_path, report_of(GREEN, RED))
    assert command("--render", str(tmp_path / "benchmark.json"))[0] == 1
    write_benchmark(tmp_path, report_of(GREEN, SKIPPED))
    assert command("--render", str(tmp_path / "benchmark.json"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--levels", "neck"), "--levels neck: expected some of core, block, backbone, detector"),
        (("--variants", "softmax", "softmax"), "--variants softmax softmax: expected each at most once"),
        (("--dtypes", "int8"), "--dtypes int8: expected some of float32"),
        (("--sizes", "4x"), "--sizes 4x: expected a side such as 16"),
        (("--sizes", "0"), "--sizes 0x0: expected sides of at least 1"),
        (("--levels", "backbone", "--image-sizes", "40"), "expected multiples of 16 pixels"),
        (("--num-heads", "5"), "--num-heads 5: expected a divisor of --embed-dims 384"),
        (("--repeats", "0"), "--repeats 0: expected at least 1"),
        (("--threads", "0"), "--threads 0: expected at least 1"),
        (("--max-seconds", "nan"), "--max-seconds nan: expected seconds >= 0"),
        (("--device", "tpu"), "--device tpu: expected 'cpu'"),
        (("--levels", "detector", "--config-prefix", "no/where"), "no/where_castling_8xb16-100e_coco.py: no such file"),
    ],
)
def test_a_bad_option_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, stderr = command("--device", "cpu", *arguments, "--out", str(tmp_path))
    assert code == 1 and stderr.strip().startswith("error: ") and said in stderr
    assert not (tmp_path / "benchmark.json").exists()


def test_a_file_that_is_no_benchmark_is_named(command: Command, tmp_path: Path) -> None:
    code, _, stderr = command("--render", str(tmp_path / "none.json"))
    assert code == 1 and "none.json: not a readable JSON file" in stderr
