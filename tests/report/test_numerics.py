"""The errors in low precision are measured against float64, and a NaN is seen."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from castling_det.analysis import numerics
from castling_det.analysis.numerics import INPUTS, measure_numerics, numerics_markdown, read_numerics, write_numerics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    return measure_numerics(tokens=(196,), dtypes=(torch.float32, torch.float16), created_by="test")


def test_errors_are_those_of_the_dtype(report):
    assert len(report.rows) == 2 * 2 * len(INPUTS) * 2
    bounds = {"float32": (1e-5, 1e-4), "float16": (1e-3, 5e-3)}
    for row in report.rows:
        assert row.finite
        assert 0 < row.out_rms < bounds[row.dtype][0] and 0 < row.grad_rms < bounds[row.dtype][1], row


def test_the_record_comes_back(report, tmp_path):
    path = tmp_path / "numerics.json"
    write_numerics(path, report)
    assert read_numerics(path) == report
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match=r"schema='other': expected .*tools/numerics\.py"):
        read_numerics(path)


def test_a_nan_is_not_averaged_away(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(numerics.INPUTS, "zero tokens", lambda qkv: qkv.fill_(torch.inf))
    out = tmp_path / "numerics.json"
    command = ["numerics.py", "--out", str(out), "--tokens", "9", "--dtypes", "float16"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "numerics.py"), run_name="__main__")
    assert stop.value.code == 1
    assert "NO: zero tokens" in capsys.readouterr().out
    assert "NO: zero tokens" in numerics_markdown(read_numerics(out))
