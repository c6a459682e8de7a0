"""The benchmark's record, its refusals and its parity check, at sizes of a few tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from castling_det.analysis.benchmark import (
    PASSES,
    VARIANTS,
    BenchmarkOptions,
    BenchmarkReport,
    BenchmarkRow,
    Timing,
    benchmark_markdown,
    goals_markdown,
    parse_size,
    read_benchmark,
    run_benchmark,
    write_benchmark,
)
from castling_det.analysis.benchmark import reference as reference_module
from castling_det.analysis.benchmark.attentions import PublishedAttention, rebuilt
from castling_det.analysis.benchmark.measure import peak_memory, timing_of
from castling_det.analysis.benchmark.parity import why_no_gradients
from castling_det.analysis.benchmark.ratios import crossover, memory_ratio, speed_up, times_floor
from castling_det.analysis.benchmark.reference import ReferenceAttention, reference_of
from castling_det.analysis.benchmark.variants import Variant
from castling_det.layers import CastlingAttention
from castling_det.report.records import Machine
from tests.compare import assert_parity
from tests.oracles.published import published_block

ROOT = Path(__file__).parents[2]
GREEN = BenchmarkRow(
    "core", "linear", "forward", "float32", 1, 10, 10, 100, "ok", None, Timing(0.9, 1.0, 1.1, 20), 2.0,
    1e-7, 1e-6, True, 1e-5, 1e-3, "output",
)  # fmt: skip
RED = dataclasses.replace(GREEN, parity_rms=None, parity_max=None, parity_ok=False)
FAILED = dataclasses.replace(
    GREEN, status="failed", reason="warm-up: RuntimeError: no | kernel", timing=None, peak_mib=None, parity_ok=None
)
SKIPPED = dataclasses.replace(FAILED, status="skipped", reason="too long")
SMALL = BenchmarkOptions(
    levels=("core",), sizes=((4, 4),), variants=("softmax", "linear"), repeats=1, warmup=1, embed_dims=16, num_heads=2
)

def report_of(*rows: BenchmarkRow) -> BenchmarkReport:
    machine = Machine("2.0", "cpu", "a processor", 2, "3.11", None)
    return BenchmarkReport(machine, "tools/benchmark.py", "2026-01-01T00:00:00+00:00", 16, 2, 12, None, rows)


def measured(row: BenchmarkRow, *, variant: str, tokens: int, ms: float) -> BenchmarkRow:
    return dataclasses.replace(row, variant=variant, tokens=tokens, timing=Timing(ms, ms, ms, 20))


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    report = report_of(GREEN, RED, FAILED, SKIPPED)
    write_benchmark(tmp_path, report)
    assert read_benchmark(tmp_path / "benchmark.json") == report
    assert not report.green and not report_of(GREEN, RED).green and report_of(GREEN, SKIPPED).green
    (tmp_path / "other.json").write_text('{"schema": "castling_det.report/1"}')
    with pytest.raises(ValueError, match=r"other.json: schema='castling_det.report/1': expected"):
        read_benchmark(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "head"}, "level='head'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"reason": "because"}, "reason='because'"),
        ({"status": "failed"}, "reason=None"),
        ({"timing": None}, "timing"),
        ({"parity_ok": None}, "parity_ok"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(GREEN, **changes)  # type: ignore[arg-type]


def test_ratios_of_green_rows() -> None:
    slow = dataclasses.replace(GREEN, timing=Timing(3, 4.0, 5, 20), peak_mib=8.0)
    assert speed_up(GREEN, slow) == "4.00x"
    assert times_floor(slow, GREEN) == "4.00x"
    assert memory_ratio(GREEN, slow) == "0.25x"


@pytest.mark.parametrize(
    ("row", "said"), [(RED, "parity red"), (FAILED, "failed"), (SKIPPED, "skipped"), (None, "-")]
)
@pytest.mark.parametrize("ratio", [speed_up, times_floor, memory_ratio])
def test_no_ratio_where_a_row_is_missing_or_wrong(
    ratio: Callable[[BenchmarkRow | None, BenchmarkRow | None], str], row: BenchmarkRow | None, said: str
) -> None:
    assert ratio(row, GREEN) == said
    assert ratio(GREEN, row) == said


@pytest.mark.parametrize("fault", [RED, FAILED, SKIPPED])
@pytest.mark.parametrize("faulty", ["softmax", "linear"])
def test_the_table_refuses_too(fault: BenchmarkRow, faulty: str) -> None:
    rows = [dataclasses.replace(fault if name == faulty else GREEN, variant=name) for name in ("softmax", "linear")]
    text = benchmark_markdown(report_of(*rows))
    table = text[text.index("## core") : text.index("Crossover")]
    assert re.search(r"\d\.\d\dx", table) is None, table
    assert ("parity red" if fault is RED else fault.status) in table
    assert "no crossover: no size with both" in text and "## Not measured or not right" in text
    assert fault is RED or fault.reason is None or fault.reason.replace("|", "\\|") in text


def test_a_crossover_by_hand() -> None:
    # Softmax over linear: 1/2 at N = 100, 4 at N = 1600. On log axes a third of the way: 100 * 16 ** (1 / 3).
    softmax = [measured(GREEN, variant="softmax", tokens=n, ms=ms) for n, ms in ((100, 1.0), (1600, 16.0))]
    linear = [measured(GREEN, variant="linear", tokens=n, ms=ms) for n, ms in ((100, 2.0), (1600, 4.0))]
    found = crossover(softmax, linear)
    assert found.tokens == pytest.approx(100 * 16 ** (1 / 3)) and "N = 252" in found.note
    assert "from about N = 252 tokens" in benchmark_markdown(report_of(*softmax, *linear))
    never = crossover(softmax[:1], linear[:1])
    assert never.tokens is None and "not slower at N = 100" in never.note
    always = crossover(softmax[1:], linear[1:])
    assert always.tokens is None and "slower from N = 1600, the smallest" in always.note
    red = dataclasses.replace(softmax[1], parity_ok=False)
    assert crossover([softmax[0], red], linear).tokens is None


def test_peak_memory_of_known_allocations() -> None:
    def call() -> Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(4 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        return second[: third.numel()]

    standing = torch.empty(1 << 20, dtype=torch.uint8)
    assert peak_memory(call, "cpu") == 5.0, "1 and 4 MiB together; what stood before does not count"
    assert standing.numel() == 1 << 20


def test_percentiles() -> None:
    assert timing_of([0.001, 0.002, 0.003, 0.004, 0.005, 0.006]) == Timing(2.0, 3.5, 5.0, 6)


@pytest.mark.parametrize("threshold", [None, 0.15])
def test_published_and_reference_are_the_oracle(threshold: float | None) -> None:
    torch.manual_seed(0)
    options = {"local_conv": "tokens", "mode": "linear" if threshold is None else "castling"}
    layer = CastlingAttention(8, 2, qkv_bias=False, threshold=threshold or 1.0, **options).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    expected = published_block(x, dict(layer.named_parameters()), 2, threshold)
    twin = reference_of(layer)
    assert type(twin) is ReferenceAttention
    assert_parity(twin(x, (3, 4)), expected, rms=1e-12, maximum=1e-11)
    if threshold is None:
        published = rebuilt(layer, PublishedAttention).double()
        published.load_state_dict(layer.state_dict())
        assert_parity(published(x, (3, 4)), expected, rms=1e-12, maximum=1e-11)


@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ["softmax", "linear", "castling"])
def test_the_reference_is_the_layer(
    mode: str, normalizer: str, local_conv: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "_BLOCK_ELEMENTS", 2 * 13 * 5)  # blocks of five queries, the last of three
    torch.manual_seed(0)
    layer = CastlingAttention(
        8, 2, mode=mode, normalizer=normalizer, local_conv=local_conv, local_conv_kernel_size=5,
        threshold=1.0, threshold_unit="uniform", num_prefix_tokens=1,
    ).double()  # fmt: skip
    if layer.dconv is not None:
        nn.init.normal_(layer.dconv.weight)
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    twin = reference_of(layer)
    assert type(twin) is ReferenceAttention
    outputs = layer(x, (3, 4)), twin(x, (3, 4))
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    assert_parity(outputs[0], outputs[1], rms=1e-12, maximum=1e-11)
    assert_parity(gradients[0], gradients[1], rms=1e-11, maximum=1e-10)


class Unpermuted(CastlingAttention):
    """Reads q, k, v head by head instead of each whole: a converter's classic mistake."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        mixed = qkv.unflatten(-1, (self.num_heads, 3, -1)).transpose(-3, -2).flatten(-3)
        return super().attend(mixed, hw)


class DetachedLocalConv(CastlingAttention):
    """Forgets the local convolution in the gradient of the values alone."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        assert self.dconv is not None
        v = qkv[..., 2 * self.dim :]
        return super().attend(qkv, hw) - self.dconv(v, hw) + self.dconv(v.detach(), hw)


class MovedThreshold(CastlingAttention):
    """A mask a fifth off."""

    def absolute_threshold(self, num_tokens: int) -> float:
        return 1.2 * super().absolute_threshold(num_tokens)


class Refusing(CastlingAttention):
    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        raise NotImplementedError(f"no kernel for {qkv.dtype}")


@pytest.mark.parametrize(
    ("name", "attention", "passes", "dtype"),
    [
        ("linear", Unpermuted, "forward", "float32"),
        ("castling", MovedThreshold, "forward", "float32"),
        ("castling", MovedThreshold, "forward", "bfloat16"),
        ("linear", DetachedLocalConv, "forward+backward", "bfloat16"),
        ("softmax", Unpermuted, "forward+backward", "float16"),
    ],
)
def test_a_wrong_variant_turns_parity_red(
    name: str, attention: type[CastlingAttention], passes: str, dtype: str
) -> None:
    options = dataclasses.replace(SMALL, sizes=((7, 9),), passes=(passes,), dtypes=(dtype,), variants=(name,))
    wrong = {**VARIANTS, name: dataclasses.replace(VARIANTS[name], attention=attention)}
    (right_row,) = run_benchmark(options, created_by="test").rows
    assert right_row.parity_ok, f"rms {right_row.parity_rms}, max {right_row.parity_max}"
    report = run_benchmark(options, created_by="test", table=wrong)
    assert report.rows[0].ok and report.rows[0].parity_red and not report.green
    assert "PARITY RED: core" in benchmark_markdown(report)


def test_a_failure_is_a_row() -> None:
    table = {**VARIANTS, "linear": dataclasses.replace(VARIANTS["linear"], attention=Refusing)}
    report = run_benchmark(dataclasses.replace(SMALL, dtypes=("float16",)), created_by="test", table=table)
    failed = {row.passes: row for row in report.rows if row.variant == "linear"}
    assert set(failed) == set(PASSES) and not report.green
    for row in failed.values():
        assert row.status == "failed" and row.timing is None
        assert row.reason == "parity: NotImplementedError: no kernel for torch.float16"


def test_a_case_too_long_is_skipped_and_says_so() -> None:
    table = {**VARIANTS, "dense": dataclasses.replace(VARIANTS["dense"], max_tokens=9)}
    options = dataclasses.replace(SMALL, sizes=((3, 3), (2, 5)), variants=("dense",), passes=("forward",))
    report = run_benchmark(options, created_by="test", table=table)
    assert [row.status for row in report.rows] == ["ok", "skipped"] and report.green
    assert report.rows[1].reason == "dense is measured up to N = 9"


def test_gradients_that_are_not_compared_are_named() -> None:
    assert why_no_gradients(1024, level="core", quadratic=True) is None
    assert why_no_gradients(1025, level="core", quadratic=True) == "N = 1025 is over 1024"
    assert why_no_gradients(10**6, level="block", quadratic=False) is None
    assert why_no_gradients(4097, level="backbone", quadratic=False) == "N = 4097 is over 4096"
    assert {name for name, variant in VARIANTS.items() if variant.quadratic} == {"softmax", "castling", "dense"}


def test_variants_are_what_they_are_called() -> None:
    plain = {"softmax", "linear", "castling", "castling_empty"}
    assert all(VARIANTS[name].attention is CastlingAttention for name in plain)
    assert VARIANTS["softmax"] == Variant({"mode": "softmax", "local_conv": None}), "nothing but the fused kernel"
    assert [name for name in VARIANTS if VARIANTS[name].levels == ("core",)] == ["floor"]
    layers = {name: CastlingAttention(8, 2, **VARIANTS[name].options) for name in plain}
    assert layers["castling_empty"].mask_is_empty(4) and not layers["castling"].mask_is_empty(4)


def test_sizes() -> None:
    assert parse_size("--sizes", "16") == (16, 16)
    assert parse_size("--sizes", "16x24") == (16, 24)


def goal_line(case: str, *reports: BenchmarkReport) -> str:
    (line,) = [line for line in goals_markdown(reports).splitlines() if case in line]
    return " ".join(line.split())


def test_a_goal_is_a_ratio_within_one_report() -> None:
    linear = dataclasses.replace(GREEN, height=64, width=64, tokens=4096, timing=Timing(2.0, 2.0, 2.0, 9))
    softmax = dataclasses.replace(linear, variant="softmax", timing=Timing(52.0, 52.0, 52.0, 9))
    case = "core, N = 4096: softmax / linear"
    assert goal_line(case, report_of(linear, softmax)).endswith("| at least 25x | 26.00x | | yes |")
    slow = dataclasses.replace(linear, timing=Timing(4.0, 4.0, 4.0, 9))
    assert goal_line(case, report_of(slow, softmax)).endswith("| at least 25x | 13.00x | | NO |")
    kernel = dataclasses.replace(linear, variant="linear_native", timing=Timing(1.0, 1.0, 1.0, 9))
    assert goal_line(case, report_of(slow, kernel, softmax)).endswith("| 13.00x | 52.00x | kernel only |")
    red = dataclasses.replace(linear, parity_ok=False)
    for reports in ((report_of(linear), report_of(softmax)), (report_of(red, softmax),), ()):
        assert goal_line(case, *reports).endswith("| not measured | | - |")


def test_a_goal_of_memory_compares_peaks() -> None:
    hybrid = dataclasses.replace(
        GREEN, variant="castling", height=64, width=64, tokens=4096, batch=2, passes="forward+backward", peak_mib=15.0
    )
    dense = dataclasses.replace(hybrid, variant="dense", peak_mib=100.0)
    line = goal_line("hybrid / dense", report_of(hybrid, dense))
    assert line.endswith("| at most 0.1x | 0.15x | | NO |")
