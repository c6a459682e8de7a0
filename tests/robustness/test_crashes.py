"""A seeded sample of `make crash-test`: real commands are killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.samples import MACHINE
from tests.robustness.crashes import ROOT, Target, crash_target, targets
from tests.robustness.records import CrashReport, CrashTarget, crash_markdown, read_crashes, write_crashes

KILLS = {"data preparation": 2, "demo training": 3}


@pytest.mark.parametrize("name", KILLS)
def test_killed_commands_start_again_and_end_the_same(tmp_path: Path, name: str) -> None:
    """In a process of its own: forks of one that has run other tests would wait for their threads forever."""
    if name not in {target.name for target in targets()}:
        pytest.skip("needs the tree crowns in data/, which `make test` prepares")
    out = tmp_path / "crashes.json"
    options = ["--kills", str(KILLS[name]), "--seed", "1", "--only", name, "--out", str(out)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.robustness.crashes", *options]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
    (record,) = read_crashes(out).targets
    assert record == CrashTarget(name, KILLS[name], KILLS[name], KILLS[name], record.leftovers, ())


IN_PLACE = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1], "result.json")
text = json.dumps(list(range(2000)))
with path.open("w") as file:
    for start in range(0, len(text), 1000):
        file.write(text[start:start + 1000])
        file.flush()
        time.sleep(0.03)
"""
ONCE = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1], "result.txt")
again = path.exists()
path.write_text("x")
time.sleep(0.3)
path.write_text("second" if again else "first")
"""


def script(tmp_path: Path, text: str, result: str) -> Target:
    path = tmp_path / "script.py"
    path.write_text(text)
    return Target("script", lambda folder: [str(path), str(folder)], (result,))


def test_control_a_torn_file_is_noticed(tmp_path: Path) -> None:
    record = crash_target(script(tmp_path, IN_PLACE, "result.json"), kills=6, seed=0, folder=tmp_path)
    assert record.kills == record.finished == record.equal == 6
    assert record.bad and all("result.json is torn" in text for text in record.bad)


def test_control_another_result_is_noticed(tmp_path: Path) -> None:
    record = crash_target(script(tmp_path, ONCE, "result.txt"), kills=3, seed=0, folder=tmp_path)
    assert record.finished == 3 and record.equal < 3
    assert any("another result in result.txt" in text for text in record.bad)


def test_the_record_comes_back_and_is_tabulated(tmp_path: Path) -> None:
    targets = (CrashTarget("a", 3, 3, 2, 1, ("2: another result in x",)), CrashTarget("b", 4, 4, 4, 0, ()))
    report = CrashReport("python -m tests.robustness.crashes", 0, 90.0, MACHINE, targets)
    write_crashes(tmp_path / "crashes.json", report)
    assert read_crashes(tmp_path / "crashes.json") == report
    (total,) = (line for line in crash_markdown(report).splitlines() if line.startswith("| all"))
    assert [int(cell) for cell in total.split("|")[2:-1]] == [7, 7, 6, 1, 1]
