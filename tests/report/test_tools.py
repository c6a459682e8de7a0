"""tools/complexity.py as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert "attention" in softmax.stdout and "gmacs" in softmax.stdout
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * (4 * 6) ** 2 * 32
    linear = tool("complexity.py", config, *shape, "--cfg-options", "model.backbone.attention=linear")
    assert linear.returncode == 0
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * 24 * 32 * 16
    missing = tool("complexity.py", str(tmp_path / "no.py"), "--shape", "64", "64")
    assert missing.returncode == 1 and "no.py: no such file" in missing.stderr
