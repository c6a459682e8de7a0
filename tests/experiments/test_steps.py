"""Steps: done once, redone when their inputs change, resumed or restarted after an interruption, loud in failure."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from castling_det.experiments import Comparison, Step, StepFailed, comparison_steps, run_steps
from tests.processes import process_context


def python_step(folder, code, **options):
    return Step("a step", (sys.executable, "-c", code, str(folder)), folder, **options)


def run(steps, **options):
    out = io.StringIO()
    run_steps(steps, Console(file=out, width=200), **options)
    return out.getvalue()


APPEND = "import sys; open(sys.argv[1] + '/out', 'a').write('x')"


def test_a_finished_step_is_not_run_again(tmp_path):
    source = tmp_path / "source"
    source.write_text("1")
    step = python_step(tmp_path / "s", APPEND, inputs=(source,))
    run([step])
    assert "done before" in run([step])
    assert (tmp_path / "s" / "out").read_text() == "x"
    source.write_text("2")
    assert "done before" not in run([step])
    assert (tmp_path / "s" / "out").read_text() == "x", "a changed input starts the step afresh"


def test_a_changed_command_is_run_again(tmp_path):
    run([python_step(tmp_path / "s", APPEND)])
    run([python_step(tmp_path / "s", APPEND + "; open(sys.argv[1] + '/more', 'w')")])
    assert (tmp_path / "s" / "more").exists()


@pytest.mark.parametrize(("keep_partial", "left"), [(True, "xx"), (False, "x")])
def test_a_failed_step_goes_on_or_starts_over(tmp_path, keep_partial, left):
    flag = tmp_path / "flag"
    code = f"{APPEND}\nimport pathlib; assert pathlib.Path({str(flag)!r}).exists(), 'no flag'"
    step = python_step(tmp_path / "s", code, keep_partial=keep_partial)
    with pytest.raises(StepFailed, match=r"(?s)a step: exit code 1 .*no flag") as failure:
        run([step])
    assert str(step.log) in str(failure.value)
    flag.touch()
    run([step])
    assert (tmp_path / "s" / "out").read_text() == left


def test_a_folder_that_is_not_ours_is_not_removed(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "precious").touch()
    run([python_step(folder, APPEND)])
    assert (folder / "precious").exists()


MEET = """
import pathlib, sys, time
here, there = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
(here / "here").touch()
end = time.monotonic() + 60
while not (there / "here").exists():
    assert time.monotonic() < end, "nobody came"
    time.sleep(0.01)
"""


def meeting(folder, other, **options):
    return Step(folder.name, (sys.executable, "-c", MEET, str(folder), str(other)), folder, **options)


def test_independent_steps_run_side_by_side(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [meeting(a, b), meeting(b, a)]
    after = python_step(tmp_path / "c", APPEND, inputs=tuple(step.stamp for step in steps))
    run([*steps, after], jobs=2)
    assert all(step.stamp.exists() for step in (*steps, after))


def test_a_step_waits_for_the_one_whose_stamp_it_reads(tmp_path):
    slow = python_step(tmp_path / "a", "import time; time.sleep(0.5); " + APPEND)
    code = f"assert open({str(slow.folder / 'out')!r}).read() == 'x'; " + APPEND
    run([slow, python_step(tmp_path / "b", code, inputs=(slow.stamp,))], jobs=2)


def test_a_failure_stops_what_runs_beside_it(tmp_path):
    flag = tmp_path / "a" / "here"
    sleeper = python_step(tmp_path / "a", f"import time; open({str(flag)!r}, 'w'); time.sleep(600)")
    code = f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)\nraise SystemExit(3)"
    with pytest.raises(StepFailed, match="exit code 3"):
        run([sleeper, replace(python_step(tmp_path / "b", code), name="b")], jobs=2)
    assert not sleeper.stamp.exists()


def test_a_killed_experiment_takes_its_commands_along_and_starts_again(tmp_path):
    """A command that went on would write beside the one that is started next."""
    code = f"""
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "pid")
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.01)
"""
    step = python_step(tmp_path / "s", code)
    experiment = process_context().Process(target=run, args=([step],))
    experiment.start()
    pid = _wait_for(tmp_path / "s" / "pid")
    experiment.kill()
    experiment.join()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the command goes on"
        time.sleep(0.01)
    assert not step.stamp.exists()
    (tmp_path / "go").touch()
    run([step])
    assert step.stamp.exists()


def _wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)
    return path.read_text()


def test_steps_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    code = "import os, sys; open(sys.argv[1] + '/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    run([python_step(tmp_path / "s", code)], jobs=3)
    assert (tmp_path / "s" / "threads").read_text() == "2"


def test_no_jobs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="jobs=0"):
        run([], jobs=0)


def test_progress_lines_of_mmengine_are_read():
    from castling_det.experiments.steps import _ITERATION

    found = _ITERATION.search("11/21 - mmengine - INFO - Iter(train) [ 10/400]  base_lr: 4.7e-04")
    assert found and (found[3], found[4]) == ("10", "400")
    assert _ITERATION.search("INFO - Epoch(test) [12/13]    eta")


def test_other_settings_are_another_key(tmp_path):
    step = python_step(tmp_path / "s", APPEND)
    assert step.key() == replace(step).key() != replace(step, settings="lr=1").key()


def test_the_comparison_is_a_chain_of_public_commands(tmp_path):
    annotations = tmp_path / "val.json"
    annotations.touch()
    plan = Comparison(
        work_dir=tmp_path / "w",
        configs=Path("configs/castling_vit"),
        tools=Path("tools"),
        prefix="gfl_castling-vit-nano",
        suffix="tree-crowns",
        train_annotations=annotations,
        annotations=annotations,
        images=tmp_path,
        seeds=(0, 3),
    )
    steps = comparison_steps(plan)
    assert len({step.name for step in steps}) == len(steps) == 13
    assert len({step.stamp for step in steps}) == 13
    train, convert, report = steps[1], steps[2], steps[-1]
    assert "randomness.seed=0" in train.command and train.command[1].endswith("mmdet/.mim/tools/train.py")
    assert str(tmp_path / "w" / "seed0" / "castling" / "iter_2400.pth") in convert.command
    assert sum(part == "--run" for part in report.command) == 6
