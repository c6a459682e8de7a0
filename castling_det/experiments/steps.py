"""Experiments as chains of commands that are resumed where they stopped: train, convert, test, report.

Every step is a command that a user could type; its stamp, written last, says that it is done and from what.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
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


def run_steps(steps: Sequence[Step], console: Console | None = None) -> None:
    """Runs what is not done yet, in order, with a progress bar.

    Raises:
        StepFailed: a command failed; its last lines are printed, and the next call starts at this step.
    """
    console = console or Console(highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    for number, step in enumerate(steps, start=1):
        label = f"[{number}/{len(steps)}] {step.name}"
        key = step.key()
        done_with = _done_with(step)
        if done_with == key:
            console.print(f"{label}: done before", markup=False)
            continue
        if not step.keep_partial or done_with is not None or _partial_key(step) not in (None, key):
            # Made from something else, or by a command that cannot go on from a part.
            _clear(step)
        step.folder.mkdir(parents=True, exist_ok=True)
        write_json(step.stamp.with_suffix(".started.json"), {"key": key, "command": list(step.command)})
        console.print(f"{label}\n    {shlex.join(step.command)}", markup=False, soft_wrap=True)
        start = time.monotonic()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(step.name, total=None)
            code = _run(step, partial(_advance, progress, task))
        seconds = time.monotonic() - start
        if code != 0:
            tail = "\n".join(step.log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:])
            raise StepFailed(f"{step.name}: exit code {code} after {seconds:.0f} s; whole log in {step.log}\n{tail}")
        write_json(step.stamp, {"key": key, "command": list(step.command), "seconds": round(seconds, 1)})
        console.print(f"    {seconds:.0f} s", markup=False)


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _run(step: Step, advance: Callable[[int, int], None]) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with step.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if found := _ITERATION.search(line):
                    advance(int(found[3]), int(found[4]))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        return process.wait()


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
