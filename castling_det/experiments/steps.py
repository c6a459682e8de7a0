"""Experiments as chains of commands that are resumed where they stopped: train, convert, test, report.

Every step is a command that a user could type; its stamp, written last, says that it is done and from what.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from castling_det.files import sha256_of, write_json

__all__ = ["Step", "StepFailed", "mmdet_tool", "run_steps"]

_ITERATION = re.compile(r"(Iter|Epoch)\((train|val|test)\)\s*\[\s*(\d+)/(\d+)\]")
_LOG_LINES_SHOWN = 15


class StepFailed(RuntimeError):
    """A step's command ended with an exit code that is not zero."""


@dataclass(frozen=True)
class Step:
    """One command of an experiment."""

    name: str
    """Shown to the user and unique in the experiment, such as `seed 0: train softmax`."""
    command: tuple[str, ...]
    folder: Path
    """Where the step writes; its log and its stamp stand there too."""
    inputs: tuple[Path, ...] = ()
    """Files whose content decides the result; when one changes, the step is done again."""
    settings: str = ""
    """Text that decides the result as the inputs do, such as a config with its bases read."""
    keep_partial: bool = False
    """The command goes on from what an interrupted run left in `folder`; otherwise it starts over."""
    stamp_name: str = "step"

    @property
    def stamp(self) -> Path:
        """The file that says the step is done."""
        return self.folder / f"{self.stamp_name}.done.json"

    @property
    def log(self) -> Path:
        """Everything that the command printed."""
        return self.folder / f"{self.stamp_name}.log"

    def key(self) -> str:
        """What the step is made from, as one hash: command, inputs' content and settings."""
        digests = {str(path): sha256_of(path) for path in self.inputs}
        return hashlib.sha256(json.dumps([self.command, digests, self.settings], sort_keys=True).encode()).hexdigest()


def mmdet_tool(name: str) -> str:
    """The path of one of MMDetection's own tools, such as `train.py`, in the installed package."""
    spec = find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise ImportError("MMDetection is not installed: pip install 'castling-det[onedl]'")
    path = Path(spec.origin).parent / ".mim" / "tools" / name
    if not path.is_file():
        raise ImportError(f"{path} is missing: MMDetection was installed without its tools; reinstall it from a wheel")
    return str(path)


def run_steps(steps: Sequence[Step], console: Console | None = None, *, jobs: int = 1) -> None:
    """Runs what is not done yet, with progress bars; a step waits for those whose stamps are among its inputs.

    Args:
        steps: in an order in which each stands behind those that it waits for.
        console: where to report; None is the terminal.
        jobs: steps that run at once, at least 1. Each gets its share of the machine's cores as `OMP_NUM_THREADS`,
            unless the environment has set that.

    Raises:
        StepFailed: a command failed; its last lines are in the message, what ran beside it is stopped, and the next
            call starts where this one ended.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: expected at least 1")
    console = console or Console(highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
        _Schedule(steps, jobs, progress, pool, environment).run()


@dataclass(frozen=True)
class _Running:
    """A step whose command runs."""

    step: Step
    key: str
    process: subprocess.Popen[str]
    since: float
    """`time.monotonic()` at its start."""


class _Schedule:
    """The steps of one call of `run_steps`, on their way."""

    def __init__(
        self,
        steps: Sequence[Step],
        jobs: int,
        progress: Progress,
        pool: ThreadPoolExecutor,
        environment: Mapping[str, str],
    ) -> None:
        self.labels = {step: f"[{number}/{len(steps)}] {step.name}" for number, step in enumerate(steps, start=1)}
        self.waiting = list(steps)
        self.jobs = jobs
        self.progress = progress
        self.pool = pool
        self.environment = environment
        self.running: dict[Future[int], _Running] = {}

    def run(self) -> None:
        try:
            while self.waiting or self.running:
                self._start_what_can()
                finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._finish(self.running.pop(future), future.result())
        finally:
            for left in self.running.values():
                left.process.terminate()

    def _start_what_can(self) -> None:
        """Starts steps, in order, until all places are taken or all others wait for one that runs."""
        for step in list(self.waiting):
            if len(self.running) == self.jobs:
                return
            unfinished = {other.stamp for other in self.waiting if other is not step}
            unfinished |= {running.step.stamp for running in self.running.values()}
            if not unfinished & set(step.inputs):
                self.waiting.remove(step)
                self._start(step)

    def _start(self, step: Step) -> None:
        key, label = step.key(), self.labels[step]
        done_with = _done_with(step)
        if done_with == key:
            self._say(f"{label}: done before")
            return
        if not step.keep_partial or done_with is not None or _partial_key(step) not in (None, key):
            # Made from something else, or by a command that cannot go on from a part.
            _clear(step)
        step.folder.mkdir(parents=True, exist_ok=True)
        write_json(step.stamp.with_suffix(".started.json"), {"key": key, "command": list(step.command)})
        self._say(f"{label}\n    {shlex.join(step.command)}")
        process = subprocess.Popen(
            step.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment,
            preexec_fn=_die_with_parent(),
        )
        running = _Running(step, key, process, time.monotonic())
        self.running[self.pool.submit(self._follow, running)] = running

    def _follow(self, running: _Running) -> int:
        """Copies what the step prints into its log until it ends; returns the exit code."""
        task = self.progress.add_task(running.step.name, total=None)
        assert running.process.stdout is not None
        with running.step.log.open("a", encoding="utf-8") as log, running.process as process:
            for line in running.process.stdout:
                log.write(line)
                log.flush()
                if found := _ITERATION.search(line):
                    self.progress.update(task, completed=int(found[3]), total=int(found[4]))
        self.progress.remove_task(task)
        return process.returncode

    def _finish(self, running: _Running, code: int) -> None:
        step, seconds = running.step, time.monotonic() - running.since
        if code != 0:
            tail = "\n".join(step.log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:])
            raise StepFailed(f"{step.name}: exit code {code} after {seconds:.0f} s; whole log in {step.log}\n{tail}")
        write_json(step.stamp, {"key": running.key, "command": list(step.command), "seconds": round(seconds, 1)})
        self._say(f"{self.labels[step]}: {seconds:.0f} s")

    def _say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, soft_wrap=True)


def _die_with_parent() -> Callable[[], None] | None:
    """For a command that is started: the kernel kills it when this process is killed; None where only Linux can.

    Otherwise it would go on beside the one that is started next.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl, option = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG

    def ask() -> None:
        prctl(option, signal.SIGKILL)

    return ask


def _done_with(step: Step) -> str | None:
    return _key_in(step.stamp)


def _partial_key(step: Step) -> str | None:
    return _key_in(step.stamp.with_suffix(".started.json"))


def _key_in(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError):
        return None


def _clear(step: Step) -> None:
    if step.folder.exists() and _partial_key(step) is not None:
        shutil.rmtree(step.folder)
