"""A seeded sample of `make crash-test`: real commands are killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.samples import MACHINE
from tests.robustness.crashes import COUNTS, ROOT, Target, crash_target, targets
from tests.robustness.records import Target as Outcome
from tests.robustness.records import Trials, read_trials, trials_markdown, write_trials

KILLS = {"data preparation": 2, "demo training": 3}


@pytest.mark.parametrize("name", ["data preparation", pytest.param("demo training", marks=pytest.mark.slow)])
def test_killed_commands_start_again_and_end_the_same(tmp_path: Path, name: str) -> None:
    """In a process of its own: forks of one that has run other tests would wait for their threads forever."""
    if name not in {target.name for target in targets()}:
        pytest.skip("needs the tree crowns in data/, which `make test` prepares")
    out = tmp_path / "crashes.json"
    options = ["--kills", str(KILLS[name]), "--seed", "1", "--only", name, "--out", str(out)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.robustness.crashes", *options]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
    (record,) = read_trials(out).targets
    assert list(record.counts.values())[:3] == [KILLS[name]] * 3 and record.failures == ()


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
    assert list(record.counts.values())[:3] == [6, 6, 6]
    assert record.failures and all("result.json is torn" in text for text in record.failures)


def test_control_another_result_is_noticed(tmp_path: Path) -> None:
    record = crash_target(script(tmp_path, ONCE, "result.txt"), kills=3, seed=0, folder=tmp_path)
    assert record.counts["finished after it"] == 3 and record.counts["same result"] < 3
    assert any("another result in result.txt" in text for text in record.failures)


def test_the_record_comes_back_and_is_tabulated(tmp_path: Path) -> None:
    numbers = (("a", (3, 3, 2, 1), ("2: another result in x",), 1.5), ("b", (4, 4, 4, 0), (), 0.5))
    targets = (Outcome(name, dict(zip(COUNTS, n, strict=True)), bad, {"s": most}) for name, n, bad, most in numbers)
    report = Trials("python -m tests.robustness.crashes", 0, 90.0, MACHINE, tuple(targets))
    write_trials(tmp_path / "crashes.json", report)
    assert read_trials(tmp_path / "crashes.json") == report
    (total,) = (line for line in trials_markdown(report).splitlines() if line.startswith("| all"))
    assert [float(cell) for cell in total.split("|")[2:-1]] == [7, 7, 6, 1, 1, 1.5]
