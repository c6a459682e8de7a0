"""Kills our commands with SIGKILL at random moments and starts them again: `python -m tests.robustness.crashes`.

After each kill every file that stands under its final name must be whole; a restart must finish, and leave the same
result as a run that nobody disturbed. Half of the moments are spread over the whole run, half follow a change in the
folder that the command writes, where a torn file would come from; all follow from --seed. The libraries are loaded
once, and each command runs in a fork: the kills fall into the work, not into imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import runpy
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from castling_det.analysis.robustness import CrashReport, CrashTarget, crash_markdown, write_crashes
from castling_det.report.machine import this_machine
from tests.robustness.crash_targets import ROOT, STUDY, Target, load_libraries, targets

TRIES = 8
EARLIER = 0.7
"""Attempts at a moment before the command's end; one that ends first is no kill, and the next comes earlier."""


@dataclass
class Tally:
    """Counts of one target."""

    kills: int = 0
    finished: int = 0
    equal: int = 0
    leftovers: int = 0
    bad: list[str] = field(default_factory=list)

    def record(self, name: str) -> CrashTarget:
        """The counts as a record."""
        return CrashTarget(name, self.kills, self.finished, self.equal, self.leftovers, tuple(self.bad))


def start(target: Target, folder: Path) -> BaseProcess:
    """Runs the command in a fork, the leader of its own process group; its output goes into a file beside `folder`."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(target, folder))
    process.start()
    return process


def _run(target: Target, folder: Path) -> None:
    os.setpgid(0, 0)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    sys.argv = list(target.command(folder))
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill(process: BaseProcess) -> bool:
    """Kills the command and its workers; False if it had ended by itself."""
    assert process.pid is not None
    ended = not process.is_alive()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet the leader of a group, or gone
        process.kill()
    process.join()
    return not ended and process.exitcode == -signal.SIGKILL


def changes(folder: Path) -> int:
    """How much has been written under `folder`: files, their sizes and times in one number."""
    found = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                entry = os.stat(os.path.join(root, name))
            except OSError:
                continue
            found ^= hash((root, name, entry.st_size, entry.st_mtime_ns))
    return found


def wait_for_change(process: BaseProcess, folder: Path, number: int) -> int:
    """Returns when the folder has changed `number` times, or the command has ended; how often it has changed."""
    seen, before = 0, changes(folder)
    while process.is_alive() and seen < number:
        now = changes(folder)
        seen += now != before
        before = now
        time.sleep(0.002)
    return seen


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed."""

    seconds: float
    changes: int
    outcome: dict[str, str]


def undisturbed(target: Target, folder: Path) -> Reference:
    """Runs a command to its end."""
    target.prepare(folder)
    began = time.monotonic()
    process = start(target, folder)
    seen = wait_for_change(process, folder, 10**9)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(
            f"{target.name}: exit code {process.exitcode}\n{folder.with_suffix('.log').read_text()[-3000:]}"
        )
    return Reference(time.monotonic() - began, max(seen, 1), target.outcome(folder))


def crash(target: Target, reference: Reference, folder: Path, rng: random.Random, number: int, tally: Tally) -> None:
    """One kill, and the run after it."""
    for attempt in range(TRIES):
        part = folder / f"{number}-{attempt}"
        target.prepare(part)
        process = start(target, part)
        if number % 2:
            wait_for_change(process, part, rng.randint(1, max(1, round(EARLIER**attempt * reference.changes))))
            time.sleep(rng.uniform(0, 0.02))
        else:
            process.join(rng.uniform(0, 0.95 * EARLIER**attempt * reference.seconds))
        if kill(process):
            break
    else:
        return
    tally.kills += 1
    tally.bad += [f"{number}: {text}" for text in target.torn(part)]
    process = start(target, part)
    process.join()
    if process.exitcode != 0:
        tally.bad.append(
            f"{number}: the restart ended with {process.exitcode}: {part.with_suffix('.log').read_text()[-300:]}"
        )
        return
    tally.finished += 1
    found = target.outcome(part)
    if found == reference.outcome:
        tally.equal += 1
    else:
        differing = sorted(key for key in {*found, *reference.outcome} if found.get(key) != reference.outcome.get(key))
        tally.bad.append(f"{number}: another result in {', '.join(differing[:5])}")
    tally.leftovers += sum(1 for path in part.rglob(".*.part"))


def crash_target(target: Target, *, kills: int, seed: int, folder: Path) -> CrashTarget:
    """Kills one command `kills` times."""
    rng = random.Random(f"{seed}:{target.name}")
    reference = undisturbed(target, folder / "reference")
    tally = Tally()
    for number in range(kills):
        crash(target, reference, folder, rng, number, tally)
    return tally.record(target.name)


def main() -> int:
    """Returns 1 if a kill did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="over all commands (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the commands")
    parser.add_argument("--study", type=Path, default=STUDY, help="trained detectors of a seed (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON record to write")
    args = parser.parse_args()
    load_libraries()
    found = [target for target in targets(args.study) if not args.only or target.name in args.only]
    began = time.monotonic()
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for target in found:
            folder = Path(scratch, target.name.replace(" ", "_"))
            record = crash_target(target, kills=-(-args.kills // len(found)), seed=args.seed, folder=folder)
            records.append(record)
            print(record, flush=True)
    command = shlex.join(["python", "-m", "tests.robustness.crashes", *sys.argv[1:]])
    report = CrashReport(command, args.seed, round(time.monotonic() - began, 1), this_machine(), tuple(records))
    print(crash_markdown(report))
    if args.out:
        write_crashes(args.out, report)
    return int(any(record.bad or record.equal < record.kills for record in records))


if __name__ == "__main__":
    sys.exit(main())
