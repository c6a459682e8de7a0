"""Feeds the readers with mutations of valid files: `python -m tests.robustness.fuzz --cases 100000`.

The only outcomes allowed are that a file is read, or that a ValueError or OSError names it. Every case follows from
seed, reader and number alone, so that one can be had again with --only READER:NUMBER.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from safetensors.torch import save

from castling_det.conversion import load_checkpoint, select_weights
from castling_det.datasets.checks import check_annotation_file, raise_for_problems
from castling_det.report.records import this_machine
from tests.datasets.test_dataset_checks import sound
from tests.robustness.hostile_files import saved
from tests.robustness.mutations import mutated_bytes, mutated_json, mutated_pickle, mutated_safetensors
from tests.robustness.records import FuzzReport, FuzzTarget, write_fuzz

SECONDS_A_CASE = 20
Mutation = Callable[[bytes, random.Random], bytes]


class TooSlow(BaseException):
    """Not an Exception: readers that catch those must not catch this."""


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: valid files, their mutations, and the function that reads one."""

    suffix: str
    files: tuple[bytes, ...]
    mutations: tuple[Mutation, ...]
    read: Callable[[Path], Any]


def runner_checkpoint() -> dict[str, Any]:
    """Small, with everything that a Runner's checkpoint holds."""
    rng = np.random.default_rng(0)
    return {
        "meta": {
            "iter": 10,
            "cfg": "model = dict(attention='castling')",
            "dataset_meta": {"classes": ("tree",), "palette": [(1, 2, 3)]},
            "best": np.float64(0.5),
            "curve": rng.standard_normal(5),
        },
        "state_dict": {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4).half(), "n": torch.tensor(3)},
        "ema_state_dict": {"steps": torch.tensor(10), "module.a.weight": torch.nn.Parameter(torch.randn(4, 3))},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


def _read_checkpoint(path: Path) -> None:
    weights = select_weights(load_checkpoint(path), path)
    # What was read can be used: every byte that it declares is there.
    for tensor in weights.tensors.values():
        tensor.detach().clone().sum(dtype=None if tensor.is_floating_point() or tensor.is_complex() else torch.int64)


def _read_annotations(path: Path) -> None:
    problems = check_annotation_file(path, classes=("oak", "fir"), image_root=path.parent / "images")
    for problem in problems:
        assert problem.field and problem.message and problem.fix
        str(problem).encode()
    # Of the faults that concern no file on disk.
    raise_for_problems((p for p in problems if p.field != "dataset.data_prefix['img']"), source=str(path))
    with redirect_stdout(io.StringIO()):
        _load_as_the_host_does(path)


def _load_as_the_host_does(path: Path) -> None:
    """What passes the check must pass MMDetection's own loader."""
    CocoDataset(
        ann_file=str(path),
        data_prefix={"img": ""},
        metainfo={"classes": ("oak", "fir")},
        filter_cfg={"filter_empty_gt": False},
        pipeline=[],
        serialize_data=False,  # which collects garbage over and over
    )


def readers() -> dict[str, Reader]:
    """By name. The files are of fixed random numbers."""
    torch.manual_seed(0)
    content = runner_checkpoint()
    tensors = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4).half(), "n": torch.tensor([3])}
    annotations = sound(images=2, boxes=2)
    annotations["annotations"][0]["segmentation"] = [[4, 5, 24, 5, 24, 35]]
    zipped = (saved(content), saved({"w": torch.randn(8)}))
    return {
        "checkpoint": Reader(".pth", zipped, (mutated_bytes, mutated_pickle, mutated_pickle), _read_checkpoint),
        "checkpoint, old format": Reader(".pth", (saved(content, zipped=False),), (mutated_bytes,), _read_checkpoint),
        "safetensors": Reader(".safetensors", (save(tensors),), (mutated_bytes, mutated_safetensors), _read_checkpoint),
        "annotations": Reader(
            ".json", (json.dumps(annotations).encode(),), (mutated_bytes, mutated_json, mutated_json), _read_annotations
        ),
    }


def mutated(reader: Reader, name: str, seed: int, number: int) -> bytes:
    """The file of one case."""
    rng = random.Random(f"{seed}:{name}:{number}")
    return rng.choice(reader.mutations)(rng.choice(reader.files), rng)


def run_case(reader: Reader, content: bytes, folder: Path) -> str:
    """`"read"`, `"refused"`, or what else happened."""
    path = folder / f"case{reader.suffix}"
    path.write_bytes(content)
    try:
        with _limit(SECONDS_A_CASE):
            reader.read(path)
    except (ValueError, OSError) as error:
        return "refused" if str(path) in str(error) else f"{type(error).__name__} without the file's name: {error}"
    except TooSlow:
        return f"took more than {SECONDS_A_CASE} seconds"
    except BaseException as error:  # this is what the fuzz is for
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process, however busy the machine is
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, reader: Reader, *, seed: int, cases: int, folder: Path) -> FuzzTarget:
    """Runs cases 0 to `cases` of one reader."""
    counts = {"read": 0, "refused": 0}
    failures = []
    for number in range(cases):
        outcome = run_case(reader, mutated(reader, name, seed, number), folder)
        if outcome in counts:
            counts[outcome] += 1
        else:
            failures.append(f"{number}: {outcome}")
    return FuzzTarget(name, cases, counts["read"], counts["refused"], tuple(failures))


def main() -> int:
    """Returns 1 if anything else than the two allowed outcomes was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON record to write")
    parser.add_argument("--only", metavar="READER:NUMBER", help="run one case, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = readers()
    start = time.process_time()
    memory = Path("/dev/shm")  # a disk is a hundred times slower
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        if args.only:
            name, _, number = args.only.rpartition(":")
            path = folder / f"case{found[name].suffix}"
            path.write_bytes(mutated(found[name], name, args.seed, int(number)))
            found[name].read(path)
            return 0
        share = -(-args.cases // len(found))
        targets = tuple(
            fuzz(name, reader, seed=args.seed, cases=share, folder=folder) for name, reader in found.items()
        )
    command = shlex.join(["python", "-m", "tests.robustness.fuzz", *sys.argv[1:]])
    report = FuzzReport(command, args.seed, round(time.process_time() - start, 1), this_machine(), targets)
    for target in targets:
        print(f"{target.name}: {target.cases} cases, {target.read} read, {target.refused} refused")
        print("\n".join(f"  FAILED {target.name}:{failure}" for failure in target.failures[:20]))
    if args.out:
        write_fuzz(args.out, report)
    return int(any(target.failures for target in targets))


if __name__ == "__main__":
    sys.exit(main())
