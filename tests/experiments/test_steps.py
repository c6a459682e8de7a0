"""Steps: done once, redone when their inputs change, resumed or restarted after an interruption, loud in failure."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from steps import ITERATION, Step, StepFailed, run_steps

from castling_det.files import locked
from tests.processes import process_context

APPEND = "import sys; open(sys.argv[1] + '/out', 'a').write('x')"


def python_step(folder, code, **options):
    command = (sys.executable, "-c", code, str(folder))
    return Step(folder.name, command, folder, "step", **options)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs steps; returns what was printed."""

    def run(*steps, **options):
        run_steps(steps, tmp_path / "work", **options)
        return capsys.readouterr().out

    return run


def test_a_finished_step_is_not_run_again(tmp_path, run):
    source, out = tmp_path / "source", tmp_path / "s" / "out"
    source.write_text("1")
    step = python_step(tmp_path / "s", APPEND, inputs=(source,), resumes=True)
    reader = python_step(tmp_path / "b", APPEND, inputs=(step.done,))
    assert "s: done\n" in run(step, reader)
    assert "s: done before" in run(step) and out.read_text() == "x"
    source.write_text("2")
    assert "done before" not in run(step, reader), "what reads a repeated step is repeated"
    assert out.read_text() == "x", "a changed input starts the step afresh"
    for changed in (replace(step, settings="lr=1"), python_step(tmp_path / "s", APPEND + "; 1", inputs=(source,))):
        assert "done before" not in run(changed) and "done before" in run(changed)
    assert json.loads(changed.done.read_text())["command"] == list(changed.command)


@pytest.mark.parametrize(("resumes", "left"), [(True, "xx"), (False, "x")])
def test_a_failed_step_goes_on_or_starts_over(tmp_path, run, resumes, left):
    flag = tmp_path / "flag"
    code = f"{APPEND}\nimport pathlib; assert pathlib.Path({str(flag)!r}).exists(), 'no flag'"
    step = python_step(tmp_path / "s", code, resumes=resumes)
    with pytest.raises(StepFailed, match=rf"(?s)s: exit code 1; whole log in {tmp_path}/s/step.log.*no flag"):
        run(step)
    flag.touch()
    run(step)
    assert (tmp_path / "s" / "out").read_text() == left


def test_a_part_made_from_something_else_is_not_resumed(tmp_path, run):
    step = python_step(tmp_path / "s", APPEND + "; sys.exit(len(sys.argv) - 2)", resumes=True)
    with pytest.raises(StepFailed):
        run(replace(step, command=(*step.command, "--wrong")))
    run(step)
    assert (tmp_path / "s" / "out").read_text() == "x"


def test_a_folder_that_is_not_ours_is_not_removed(tmp_path, run):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious").touch()
    run(python_step(tmp_path / "s", APPEND))
    assert (tmp_path / "s" / "precious").exists()


def waiting_for(flag, then=""):
    return f"""
import pathlib, sys, time
(pathlib.Path(sys.argv[1]) / "here").touch()
end = time.monotonic() + 60
while not pathlib.Path({str(flag)!r}).exists():
    assert time.monotonic() < end, "nobody came"
    time.sleep(0.01)
{then}"""


def test_independent_steps_run_side_by_side(tmp_path, run):
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [python_step(a, waiting_for(b / "here")), python_step(b, waiting_for(a / "here"))]
    after = python_step(tmp_path / "c", APPEND, inputs=tuple(step.done for step in steps))
    run(after, *steps, jobs=2)
    assert all(step.done.exists() for step in (*steps, after)), "in whatever order they are given"


def test_a_failure_stops_what_runs_beside_it_and_keeps_what_is_done(tmp_path, run):
    first = python_step(tmp_path / "first", APPEND)
    sleeper = python_step(tmp_path / "sleeper", waiting_for(tmp_path / "never"), inputs=(first.done,))
    failing = python_step(
        tmp_path / "failing", waiting_for(tmp_path / "sleeper" / "here", "sys.exit(3)"), inputs=(first.done,)
    )
    with pytest.raises(StepFailed, match="failing: exit code 3"):
        run(first, sleeper, failing, jobs=2)
    assert not sleeper.done.exists()
    assert "first: done before" in run(first)


def test_a_killed_experiment_takes_its_commands_along_and_starts_again(tmp_path, run):
    """A command that went on would write beside the one that is started next."""
    then = "import os; assert os.getppid() != 1"
    first = python_step(tmp_path / "first", APPEND)
    pid = "(pathlib.Path(sys.argv[1]) / 'pid').write_text(str(__import__('os').getpid()))"
    step = python_step(tmp_path / "s", "import pathlib, sys\n" + pid + waiting_for(tmp_path / "go", then))
    step = replace(step, inputs=(first.done,))
    experiment = process_context().Process(target=run_steps, args=([first, step], tmp_path / "work"))
    experiment.start()
    _wait_until((tmp_path / "s" / "here").exists)
    experiment.kill()
    experiment.join()
    status = Path("/proc", (tmp_path / "s" / "pid").read_text(), "stat")
    _wait_until(lambda: not status.exists() or status.read_text().split()[2] == "Z")
    assert not step.done.exists()
    (tmp_path / "go").touch()
    assert "first: done before" in run(first, step), "a kill loses nothing that was done"
    assert step.done.exists()


def _wait_until(reached):
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_experiment_in_the_same_folder_is_refused(tmp_path, run):
    """They would delete each other's folders."""
    step = python_step(tmp_path / "s", APPEND)
    with (
        locked(tmp_path / "work" / ".lock"),
        pytest.raises(StepFailed, match=r"another experiment is writing to .*work: wait .*--work-dir"),
    ):
        run(step)
    assert not step.folder.exists()
    run(step)


def test_steps_share_the_cores(tmp_path, run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    code = "import os, sys; open(sys.argv[1] + '/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    run(python_step(tmp_path / "s", code), jobs=3)
    assert (tmp_path / "s" / "threads").read_text() == "2"
    with pytest.raises(ValueError, match="jobs=0"):
        run(jobs=0)


def test_progress_lines_of_mmengine_are_read():
    found = ITERATION.search("11/21 - mmengine - INFO - Iter(train) [ 10/400]  base_lr: 4.7e-04")
    assert found and found.groups() == ("10", "400")
    assert ITERATION.search("INFO - Epoch(test) [12/13]    eta")
