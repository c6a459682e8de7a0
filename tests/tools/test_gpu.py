"""`make gpu-check` as far as a CPU shows it: every case runs at tiny sizes, and nothing wrong is timed."""

from __future__ import annotations

import dataclasses

import pytest

from tools.benchmarks import gpu


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "DRY", dataclasses.replace(gpu.DRY, tokens=(16,), parity_tokens=(49,)))


def test_the_dry_run_measures_every_case(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    report = gpu.read_gpu(out)
    assert [row.case for row in report.rows if row.case != "core"] == ["parity"] * 4 + ["ViT-S"] * 3 + ["iteration"]
    assert sum(row.case == "core" for row in report.rows) == 2 * len(gpu.VARIANTS)
    assert all(row.ms > 0 and row.error is None for row in report.rows if row.case != "parity")
    assert not report.kernels and gpu.gpu_markdown(report) in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(gpu.VARIANTS, "linear", lambda qkv: gpu.linear(qkv.flip(3)))
    assert gpu.main(["--dry-run"]) == 1
    assert "core" not in capsys.readouterr().out


def test_a_detector_that_fails_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "DRY", dataclasses.replace(gpu.DRY, families=("castling_vit/none_coco",)))
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.json")]) == 1
    assert "FileNotFoundError" in gpu.read_gpu(tmp_path / "gpu.json").rows[-1].error


def test_families_are_configs():
    assert all((gpu.ROOT / "configs" / f"{family}.py").is_file() for family in gpu.FAMILIES)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--dry-run" in capsys.readouterr().err
