"""tools/complexity.py as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from castling_det.report.complexity_text import read_complexity
from tests.report.conftest import Tool
from tests.report.samples import write_test


def test_complexity(tool: Tool, tmp_path: Path) -> None:
    write_test(tmp_path, mAP=0.1)
    config = str(next(tmp_path.glob("*/vis_data/config.py")))
    out = tmp_path / "out.json"
    shape = ("--shape", "64", "80", "--json", str(out))
    softmax = tool("complexity.py", config, *shape)
    assert softmax.returncode == 0, softmax.stderr
    assert "64 x 80 pixels (height x width) padded to 64 x 96" in softmax.stdout
    assert "attention_scores" in softmax.stdout and "gmacs" in softmax.stdout
    macs = read_complexity(out).macs_by_kind["attention_scores"]
    assert macs == 2 * (4 * 6) ** 2 * 32
    linear = tool("complexity.py", config, *shape, "--cfg-options", "model.backbone.attention=linear")
    assert linear.returncode == 0 and read_complexity(out).macs_by_kind["attention_scores"] == 2 * 24 * 32 * 16
    missing = tool("complexity.py", str(tmp_path / "no.py"), "--shape", "64", "64")
    assert missing.returncode == 1 and "no.py: no such file" in missing.stderr
    assert json.loads(out.read_text())["schema"].startswith("castling_det.complexity/")
