"""Kills our commands with SIGKILL at random moments and starts them again: `python -m tests.robustness.crashes`.

After each kill every file that stands under its final name must be whole; a restart must finish, and leave the same
result as a run that nobody disturbed. Half of the moments are spread over the whole run. The other half follow a change
in the folder that the command writes, when a file may be half written. The libraries are loaded once, and each command
runs in a fork: the kills hit the work, not the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from castling_det.conversion import load_checkpoint
from castling_det.report.records import this_machine
from tests.robustness.records import Target as Outcome
from tests.robustness.records import Trials, trials_markdown, write_trials

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "work_dirs" / "study" / "seed0"
CONFIG = f"{ROOT}/configs/castling_vit/gfl_castling-vit-nano_{{}}_tree-crowns.py"
SHORT = (
    "train_cfg.max_iters=24 train_cfg.val_interval=12 default_hooks.checkpoint.interval=4 randomness.seed=0 "
    "default_hooks.logger.interval=4 train_dataloader.batch_size=1 val_dataloader.dataset.indices=2"
)
COUNTS = ("kills", "finished after it", "same result", "temporary files left")
_PASSING = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+\d\d:\d\d|Z)?|\b[0-9a-f]{40}(\+changes)?")
"""Times, and the commit of a checkout that people work in."""


@dataclass(frozen=True)
class Target:
    """A command that writes into a folder, and the files in it that must be the same after a restart."""

    name: str
    command: Callable[[Path], Sequence[str]]
    results: tuple[str, ...]

    def outcome(self, folder: Path) -> dict[str, str]:
        """A hash of every result."""
        paths = sorted(path for pattern in self.results for path in folder.rglob(pattern))
        assert paths, f"{self.name}: no {self.results} in {folder}"
        return {str(path.relative_to(folder)): hashlib.sha256(_content(path, folder)).hexdigest() for path in paths}


def _content(path: Path, folder: Path) -> bytes:
    """What a file says, without times, commits and the name of its folder."""
    if path.suffix == ".pth":
        return b"".join(_tensors(load_checkpoint(path)))
    if path.suffix == ".onnx":
        import onnx

        return bytes(onnx.load(path).graph.SerializeToString())
    if path.suffix in (".json", ".md", ".html"):
        return _PASSING.sub("", path.read_text()).replace(str(folder), "FOLDER").encode()
    return path.read_bytes()


def _tensors(entries: Mapping[str, Any]) -> list[bytes]:
    found = []
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            found.append(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            found += _tensors(value)
    return found


def torn(folder: Path) -> list[str]:
    """Files under their final names that are not whole; logs are written line by line and do not count."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        passing = "vis_data" in parts or path.suffix in (".log", ".py") or any(part.startswith(".") for part in parts)
        if path.is_file() and not passing and not _is_whole(path):
            found.append(f"{path.relative_to(folder)} is torn ({path.stat().st_size} bytes)")
    return found


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".html":
            return path.read_text().rstrip().endswith("</html>")
        elif path.name == "last_checkpoint":
            return Path(path.read_text()).is_file()
        elif path.suffix in (".pth", ".onnx"):
            _content(path, path.parent)
    except Exception:  # damaged files fail in many ways
        return False
    return path.stat().st_size > 0


def targets(study: Path = STUDY, data: Path = ROOT / "data" / "tree_crowns") -> list[Target]:
    """Every command whose inputs are there: conversion, report and export need trained detectors."""
    tools, castling, deploy = ROOT / "tools", CONFIG.format("castling"), CONFIG.format("deploy")
    trained, deployed = sorted((study / "castling").glob("best_*.pth")), study / "deploy" / "deploy.pth"
    wheel = next(iter(sorted((data / "cache").glob("*.whl"))), None)
    mmdet = find_spec("mmdet")
    assert mmdet is not None and mmdet.origin is not None
    train = f"{Path(mmdet.origin).parent}/.mim/tools/train.py"
    runs = " ".join(f"--run {name}={study / name}" for name in ("softmax", "castling", "deploy"))
    report = f"{runs} --baseline softmax --deployed deploy --ann {data}/annotations/val.json --images {data}/val"
    prepare = tools / "dataset_converters" / "tree_crowns.py"
    table = (
        ("data preparation", wheel if prepare.is_file() else None,
         f"{prepare} --root {{}}/data --wheel {wheel}", ("*.json", "*.png")),
        ("demo training", data / "annotations" / "train.json",
         f"{train} {castling} --work-dir {{}} --resume --cfg-options {SHORT}", ("iter_24.pth",)),
        ("conversion", trained[0] if trained else None,
         f"{tools}/convert.py {castling} {trained[0] if trained else ''} {{}}/deploy.pth", ("deploy.pth",)),
        ("report", deployed, f"{tools}/report.py {report} --out {{}}", ("report.json", "report.md", "index.html")),
        ("export", deployed, f"{tools}/export_onnx.py {deploy} {deployed} {{}}/deploy.onnx", ("deploy.onnx",)),
    )  # fmt: skip
    return [
        Target(name, lambda folder, text=text: text.format(folder).split(), results)  # type: ignore[misc]
        for name, needed, text, results in table
        if needed is not None and needed.is_file()
    ]


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


def _state(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for root, _, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in names):
            if os.path.exists(path):
                try:
                    entry = os.stat(path)
                except OSError:  # gone meanwhile
                    continue
                found.add((path, entry.st_size, entry.st_mtime_ns))
    return found


def wait_for_change(process: BaseProcess, folder: Path, number: int) -> int:
    """Returns when the folder has changed `number` times, or the command has ended; how often it has changed."""
    seen, before = 0, _state(folder)
    while process.is_alive() and seen < number:
        now = _state(folder)
        seen, before = seen + (now != before), now
        time.sleep(0.002)
    return seen


def finish(process: BaseProcess, folder: Path) -> None:
    """Waits for the end of a command; RuntimeError with its last lines if it failed."""
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"exit code {process.exitcode}: {folder.with_suffix('.log').read_text()[-3000:]}")


def crash_target(target: Target, *, kills: int, seed: int, folder: Path) -> Outcome:
    """Kills one command `kills` times, each time in a new folder, and starts it again."""
    rng, reference = random.Random(f"{seed}:{target.name}"), folder / "reference"
    reference.mkdir(parents=True)
    began, process = time.monotonic(), start(target, reference)
    changes = max(wait_for_change(process, reference, 10**9), 1)
    finish(process, reference)
    seconds, expected = time.monotonic() - began, target.outcome(reference)
    killed = finished = equal = leftovers = 0
    bad: list[str] = []
    for number in range(kills):
        for attempt in range(8):  # a run that ends before its kill is none, and the next kill comes earlier
            part = folder / f"{number}-{attempt}"
            part.mkdir()
            process, share = start(target, part), 0.7**attempt
            if number % 2:
                wait_for_change(process, part, rng.randint(1, max(1, round(share * changes))))
                time.sleep(rng.uniform(0, 0.02))
            else:
                process.join(rng.uniform(0, 0.95 * share * seconds))
            if kill(process):
                break
        else:
            continue
        killed += 1
        bad += [f"{number}: {text}" for text in torn(part)]
        try:
            finish(start(target, part), part)
        except RuntimeError as error:
            bad.append(f"{number}: the restart ended with {str(error)[-300:]}")
            continue
        finished += 1
        found = target.outcome(part)
        differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        equal += not differing
        bad += [f"{number}: another result in {', '.join(differing[:5])}"] if differing else []
        leftovers += sum(1 for path in part.rglob(".*.part"))
    counts = (killed, finished, equal, leftovers)
    return Outcome(target.name, dict(zip(COUNTS, counts, strict=True)), tuple(bad))


def load_libraries() -> None:
    """What the commands would import one by one, with one thread."""
    torch.set_num_threads(1)
    import mmcv.ops  # noqa: F401
    import mmdet.datasets
    import mmdet.evaluation
    import mmdet.models
    import mmdet.visualization  # noqa: F401
    import mmengine.runner  # noqa: F401


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
    began, records = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        for target in found:
            folder = Path(scratch, target.name.replace(" ", "_"))
            record = crash_target(target, kills=-(-args.kills // len(found)), seed=args.seed, folder=folder)
            records.append(record)
            print(record, flush=True)
    command = shlex.join(["python", "-m", "tests.robustness.crashes", *sys.argv[1:]])
    report = Trials(command, args.seed, round(time.monotonic() - began, 1), this_machine(), tuple(records))
    print(trials_markdown(report))
    if args.out:
        write_trials(args.out, report)
    return int(any(record.failures or record.counts["same result"] < record.counts["kills"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
