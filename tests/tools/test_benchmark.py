"""tools/benchmark.py at sizes of a few tokens: the gate, the record, the ratios, and a failure as a row."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from castling_det.layers import CastlingAttention
from tests.report.samples import MACHINE
from tools.benchmarks import attention
from tools.benchmarks.attention import Benchmark, Row, Timing, benchmark_markdown, main, ratios_markdown, read_benchmark
from tools.benchmarks.variants import VARIANTS

ROOT = Path(__file__).parents[2]
GREEN = Row("core", "linear", "forward", "float32", 1, 10, 10, 100, "ok", None, Timing(0.9, 1.0, 1.1, 20), 2.0, 1e-7,
            1e-6, True, 1e-4, 1e-3, "output")  # fmt: skip
RED = dataclasses.replace(GREEN, parity_rms=0.5, parity_max=1.0, parity_ok=False)
FAILED = dataclasses.replace(GREEN, status="failed", reason="RuntimeError: no kernel", timing=None, parity_ok=None)
SMALL = ("--embed-dims", "16", "--num-heads", "2", "--seconds", "0", "--threads", "1", "--device", "cpu")


def report_of(*rows: Row) -> Benchmark:
    return Benchmark(MACHINE, "tools/benchmark.py", "2026-01-01T00:00:00+00:00", 16, 2, 12, None, rows)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command(tmp_path, capsys):
    arguments = ["--levels", "core", "block", "--sizes", "4x5", *SMALL]
    code = main([*arguments, "--out", str(tmp_path)])
    text, found = capsys.readouterr().out, read_benchmark(tmp_path / "benchmark.json")
    assert code == 0, [row for row in found.rows if row.fault]
    assert len(found.rows) == 7 + 6 + 6 + 6, "four tables; the floor in one of them"
    assert found.machine.threads == 1 and {row.tokens for row in found.rows} == {20}
    assert all(row.timing.p20_ms <= row.timing.p50_ms <= row.timing.p80_ms and row.peak_mib > 0 for row in found.rows)
    assert {row.compared for row in found.rows if row.passes == "forward+backward"} == {"output and gradients"}
    assert "## block, forward+backward, float32, batch 1" in text
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "benchmark.md").unlink()
    assert main(["--render", str(tmp_path / "benchmark.json")]) == 0
    assert capsys.readouterr().out == text and (tmp_path / "benchmark.md").read_text().strip() == text.strip()


def test_backbone_and_detector(tmp_path):
    prefix = str(ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano")
    arguments = ["--levels", "backbone", "detector", "--image-sizes", "32x64", "--depth", "2", *SMALL]
    code = main([*arguments, "--variants", "softmax", "castling", "--config-prefix", prefix, "--out", str(tmp_path)])
    found = read_benchmark(tmp_path / "benchmark.json")
    assert code == 0, [row for row in found.rows if row.fault]
    assert {(row.level, row.tokens) for row in found.rows} == {("backbone", 8), ("detector", 32)}
    assert found.detector == f"{prefix}_*_8xb16-100e_coco.py"


class Unpermuted(CastlingAttention):
    """Reads q, k, v head by head instead of each whole."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        return super().attend(qkv.unflatten(-1, (self.num_heads, 3, -1)).transpose(-3, -2).flatten(-3), hw)


class DetachedLocalConv(CastlingAttention):
    """Forgets the local convolution in the gradient of the values alone."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        v = qkv[..., 2 * self.dim :]
        return super().attend(qkv, hw) - self.dconv(v, hw) + self.dconv(v.detach(), hw)


class Transposed(CastlingAttention):
    """Takes the map for one of the other height and width."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        return super().attend(qkv, hw[::-1])


class Refusing(CastlingAttention):
    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        raise NotImplementedError(f"no kernel for {qkv.dtype}")


@pytest.mark.parametrize(
    ("name", "wrong", "passes", "dtype"),
    [
        ("linear", Unpermuted, "forward", "float32"),
        ("castling", Transposed, "forward", "bfloat16"),
        ("linear", DetachedLocalConv, "forward+backward", "bfloat16"),
        ("softmax", Unpermuted, "forward+backward", "float16"),
        ("linear", Refusing, "forward", "float16"),
    ],
)
def test_a_wrong_variant_has_no_ratio(name, wrong, passes, dtype, tmp_path, monkeypatch, capsys):
    arguments = ["--levels", "core", "--sizes", "7x9", "--passes", passes, "--dtypes", dtype, *SMALL]
    arguments += ["--variants", name, "--out", str(tmp_path)]
    assert main(arguments) == 0
    monkeypatch.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], attention=wrong))
    assert main(arguments) == 1
    (row,) = read_benchmark(tmp_path / "benchmark.json").rows
    if wrong is Refusing:
        assert row.status == "failed" and row.reason == "NotImplementedError: no kernel for torch.float16"
        assert row.reason in capsys.readouterr().out
    else:
        assert row.fault == "parity red" and "RED: " in capsys.readouterr().out


def test_a_case_too_long_is_skipped_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "dense", dataclasses.replace(VARIANTS["dense"], max_tokens=9))
    arguments = ["--levels", "core", "--sizes", "3", "2x5", "--passes", "forward", "--variants", "dense", *SMALL]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert [row.status for row in read_benchmark(tmp_path / "benchmark.json").rows] == ["ok", "skipped"]


@pytest.mark.parametrize("fault", [RED, FAILED])
@pytest.mark.parametrize("faulty", ["softmax", "linear"])
def test_no_ratio_of_a_row_that_is_wrong(fault, faulty):
    rows = [dataclasses.replace(fault if name == faulty else GREEN, variant=name) for name in ("softmax", "linear")]
    good = dataclasses.replace(GREEN, variant="softmax", timing=Timing(3, 4.0, 5, 20), peak_mib=8.0)
    for render in (benchmark_markdown, lambda found: ratios_markdown([found])):
        (line,) = (
            line for line in render(report_of(good, GREEN)).splitlines() if "10 x 10" in line and "4.00x" in line
        )
        assert "0.25x" in line
        of_linear = [line for line in render(report_of(*rows)).splitlines() if "| 10 x 10" in line and "linear" in line]
        assert not any(re.search(r"\d\.\d\dx", line) for line in of_linear)
    assert ("parity red" if fault is RED else "failed") in ratios_markdown([report_of(*rows)])


def test_peak_memory_of_known_allocations():
    def call() -> Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(4 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        return second[: third.numel()]

    assert attention._peak_mib(call, "cpu") == 5.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--levels", "neck"), "invalid choice: 'neck'"),
        (("--sizes", "4x"), "argument --sizes"),
        (("--sizes", "0"), "0: expected sides of at least 1"),
        (("--threads", "0"), "0: expected at least 1"),
    ],
)
def test_a_bad_option_is_named(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_other_faults_are_named(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"schema": "castling_det.report/1"}')
    for path, said in (("none.json", "no such regular"), ("other.json", "schema='castling_det.report/1': expected")):
        assert main(["--render", str(tmp_path / path)]) == 1
        assert said in capsys.readouterr().err
    assert main(["--num-heads", "5", "--out", str(tmp_path)]) == 1
    assert "--num-heads 5: expected a divisor of --embed-dims 384" in capsys.readouterr().err


def test_committed_records_are_read():
    records = sorted((ROOT / "results" / "attention").glob("*/benchmark.json"))
    found = [read_benchmark(path) for path in records]
    assert len(found) == 4 and all(row.fault is None for one in found for row in one.rows)
    assert {row.variant for one in found for row in one.rows} <= set(VARIANTS)
