"""Steps of an experiment as tasks of doit: each is done once, and goes on where it was interrupted.

Every step is a command that a user could type. Beside its results `STEM.log` holds what it printed, and
`STEM.done.json` says that it is done. doit keeps in `WORK_DIR/.doit.json` what each step was made from, and repeats the
step when that changes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from doit.control import TaskControl  # type: ignore[import-untyped]
from doit.dependency import Dependency, JsonDB  # type: ignore[import-untyped]
from doit.exceptions import BaseFail, TaskFailed  # type: ignore[import-untyped]
from doit.reporter import ZeroReporter  # type: ignore[import-untyped]
from doit.runner import MThreadRunner  # type: ignore[import-untyped]
from doit.task import Task, dict_to_task  # type: ignore[import-untyped]
from doit.tools import config_changed  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress

from castling_det.files import locked, sha256_of, write_json, write_text

ITERATION = re.compile(r"(?:Iter|Epoch)\((?:train|val|test)\)\s*\[\s*(\d+)/(\d+)\]")
LOG_LINES_SHOWN = 15


@dataclass(frozen=True)
class Step:
    """One command of an experiment."""

    name: str
    """Shown to the user and unique in the experiment, such as `seed 0: train softmax`."""
    command: tuple[str, ...]
    folder: Path
    """Where the step writes. It is emptied first, unless the command can go on from what is there."""
    stem: str
    """Of the step's own files in the folder."""
    inputs: tuple[Path, ...] = ()
    """Files whose content decides the result; the step waits for those that another step writes."""
    settings: str = ""
    """Text that decides the result as the inputs do, such as a config with its bases."""
    resumes: bool = False
    """The command goes on from what an interrupted run left."""

    @property
    def done(self) -> Path:
        """The file that says that the step is done."""
        return self.folder / f"{self.stem}.done.json"

    def run(self, progress: Progress, running: dict[str, subprocess.Popen[str]]) -> TaskFailed | None:
        """Runs the command to its end, with a bar of its iterations."""
        self._clear()
        log_file, since = self.folder / f"{self.stem}.log", time.monotonic()
        bar = progress.add_task(self.name, total=None)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        with (
            log_file.open("a", encoding="utf-8") as log,
            subprocess.Popen(self.command, text=True, env=environment, preexec_fn=_die_with_parent, **pipes) as process,
        ):
            running[self.name] = process
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                if found := ITERATION.search(line):
                    progress.update(bar, completed=int(found[1]), total=int(found[2]))
        progress.remove_task(bar)
        del running[self.name]
        if process.returncode:
            tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
            return TaskFailed(f"{self.name}: exit code {process.returncode}; whole log in {log_file}\n{tail}")
        # The time makes the file another one, so that what reads a repeated step is repeated.
        seconds = round(time.monotonic() - since, 1)
        write_json(self.done, {"command": list(self.command), "seconds": seconds, "ended": time.time()})
        return None

    def _clear(self) -> None:
        """Removes what an earlier run left, if it was made from something else or the command starts over anyway."""
        started = self.folder / f"{self.stem}.started.json"
        made_from = [self.command, {str(path): sha256_of(path) for path in self.inputs}, self.settings]
        key = sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        if started.is_file() and not (self.resumes and json.loads(started.read_bytes())["key"] == key):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(started, {"key": key, "command": list(self.command)})

    def task(self, *arguments: Any) -> dict[str, Any]:
        """The step as doit takes it; `arguments` are those of `run`."""
        return {
            "name": self.name,
            "actions": [(self.run, arguments)],
            "file_dep": [str(path) for path in self.inputs],
            "targets": [str(self.done)],
            "uptodate": [config_changed(json.dumps([self.command, self.settings]))],
            "io": {"capture": False},
        }


def _die_with_parent() -> None:
    """In a new process on Linux: the kernel kills it with its parent, so that it does not write beside the next run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Record(JsonDB):
    """doit's record, replaced as a whole: it is written after every step, and a kill must not cut it short."""

    def dump(self) -> None:
        write_text(self.name, self.codec.encode(self._db))


class _Reporter(ZeroReporter):
    """Says what is done; the first failure ends what runs beside it."""

    def __init__(self, console: Console, record: _Record, running: Mapping[str, subprocess.Popen[str]]) -> None:
        self.console, self.record, self.running = console, record, running
        self.failures: list[str] = []

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def execute_task(self, task: Task) -> None:
        self._say(f"{task.name}: started")

    def add_success(self, task: Task) -> None:
        self.record.dump()
        self._say(f"{task.name}: done")

    def skip_uptodate(self, task: Task) -> None:
        self._say(f"{task.name}: done before")

    def add_failure(self, task: Task, fail: BaseFail) -> None:
        self.failures.append(fail.get_msg())
        for process in list(self.running.values()):
            process.terminate()

    def runtime_error(self, msg: str) -> None:
        self.failures.append(msg)


class StepFailed(RuntimeError):
    """A step could not be done; the next call of `run_steps` starts with it."""


def run_steps(steps: Sequence[Step], work_dir: Path, *, jobs: int = 2) -> None:
    """Runs what is not done yet, `jobs` steps at once, each with its share of the cores.

    Raises:
        StepFailed: a command failed, and what ran beside it was stopped; or another call writes to `work_dir`.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: expected at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        with locked(work_dir / ".lock", wait=False), Progress(transient=True) as progress:
            control = TaskControl([dict_to_task(step.task(progress, running)) for step in steps])
            control.process(None)
            manager = Dependency(_Record, str(work_dir / ".doit.json"))
            reporter = _Reporter(progress.console, manager.backend, running)
            MThreadRunner(manager, reporter, num_process=jobs).run_all(control.task_dispatcher())
    except BlockingIOError:
        reason = f"another experiment is writing to {work_dir}: wait until it ends, or give another --work-dir"
        raise StepFailed(reason) from None
    if reporter.failures:
        raise StepFailed(reporter.failures[0])
