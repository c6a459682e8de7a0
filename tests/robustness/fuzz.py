"""Feeds the readers with mutations of valid files: `python -m tests.robustness.fuzz --cases 100000`.

The only outcomes allowed are that a file is read, or that a ValueError or OSError names it, within 10 seconds and
300 MB. Cases run in child processes with limits of their own. Every case follows from seed, reader and number alone, so
that one can be had again with --only READER:NUMBER.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.datasets import CocoDataset
from PIL import Image
from safetensors.torch import save

from castling_det.conversion import load_checkpoint, select_weights
from castling_det.datasets.checks import check_annotation_file, raise_for_problems
from castling_det.report.evaluation import Annotations, evaluate_boxes
from castling_det.report.records import this_machine
from castling_det.runtime.detections import Detections
from castling_det.runtime.metadata import PREFIX, ModelMetadata
from castling_det.runtime.onnx_detector import OnnxDetector
from castling_det.runtime.run import detect_source
from castling_det.runtime.sources import open_source, read_image
from tests.datasets.test_dataset_checks import sound
from tests.robustness.hostile_files import saved
from tests.robustness.mutations import (
    any_folder,
    mutated_bytes,
    mutated_entries,
    mutated_header,
    mutated_json,
    mutated_pickle,
    mutated_safetensors,
)
from tests.robustness.records import Target, Trials, trials_markdown, write_trials
from tests.runtime.conftest import FORMATS, METADATA, photo, spot_model

SECONDS_A_CASE = 10
MEGABYTES_A_CASE = 300
BATCH = 2500
"""Cases of one child process."""
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


def _read_metadata(path: Path) -> None:
    detector = _spot()
    detector.path, detector.info = path, ModelMetadata.from_properties(json.loads(path.read_bytes()), str(path))
    detector.classes = detector.info.classes
    detector.detect([photo()])


@cache
def _spot() -> OnnxDetector:
    with tempfile.TemporaryDirectory() as folder:
        return OnnxDetector(spot_model(Path(folder, "spot.onnx")))


def _read_results(path: Path) -> None:
    truth = _truth(path.parent)
    evaluate_boxes(truth.document, truth.results(path))


@cache
def _truth(folder: Path) -> Annotations:
    path = folder / "truth.json"
    path.write_text(json.dumps(sound(images=2, boxes=2)))
    return Annotations(path)


def _read_truth(path: Path) -> None:
    truth = Annotations(path)
    boxes = [{**box, "score": 0.5} for box in truth.document["annotations"]]
    if boxes:
        evaluate_boxes(truth.document, boxes)


def _read_image(path: Path) -> None:
    image = read_image(path, max_pixels=10**6)
    assert image.size <= 3 * 10**6 and image.dtype == np.uint8


def _read_folder(path: Path) -> None:
    """Whatever lies in the folder: detection takes it, or says on one line that it does not, and writes the rest."""
    tree, out = Path(f"{path}.tree"), Path(f"{path}.out")
    for old in (tree, out):
        shutil.rmtree(old, ignore_errors=True)
    _build(tree, json.loads(path.read_bytes()))
    source = open_source(str(tree))
    with redirect_stderr(io.StringIO()) as said:
        outcome = detect_source(_NOTHING, source, out)  # type: ignore[arg-type]
    assert outcome.images + outcome.skipped == source.total
    assert len(said.getvalue().splitlines()) == outcome.skipped
    if outcome.images:
        written = json.loads((out / "images.json").read_bytes())["images"]
        pictures = os.listdir(out / "pictures")
        assert sorted(image["file_name"] for image in written) == sorted(pictures) and len(pictures) == outcome.images


_NOTHING = SimpleNamespace(
    classes=("x",),
    batch_size=3,
    detect=lambda images: [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), ("x",)) for _ in images],
    draw=lambda image, found: image,
)


def _build(tree: Path, entries: list[tuple[str, str]]) -> None:
    tree.mkdir()
    for name, kind in entries:
        path = tree / name
        if os.path.lexists(path):
            continue
        match kind:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "loop":
                path.symlink_to(path)
            case "device" | "gone":
                path.symlink_to({"device": "/dev/zero", "gone": "/gone.png"}[kind])
            case _:
                content = _encoded()["png"]
                path.write_bytes({"image": content, "cut": content[:99], "empty": b""}[kind])


@cache
def _encoded() -> dict[str, bytes]:
    """A small image in the formats that detection reads."""
    moving = {"save_all": True, "append_images": [Image.fromarray(photo(seed=1))]}
    moving_too = {"moving PNG": {"format": "PNG", **moving}, "moving WebP": {"format": "WEBP", **moving}}
    found = {}
    for name, options in {**FORMATS, **moving_too}.items():
        buffer = io.BytesIO()
        Image.fromarray(photo()).save(buffer, **options)
        found[name] = buffer.getvalue()
    return found


def readers() -> dict[str, Reader]:
    """By name. The files are of fixed random numbers."""
    torch.manual_seed(0)
    content = runner_checkpoint()
    tensors = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4).half(), "n": torch.tensor([3])}
    annotations = sound(images=2, boxes=2)
    annotations["annotations"][0]["segmentation"] = [[4, 5, 24, 5, 24, 35]]
    results = [{**box, "score": 0.5} for box in sound(images=2, boxes=2)["annotations"]]
    metadata = {f"{PREFIX}{name}": json.dumps(value) for name, value in METADATA.items()}
    changes = (mutated_bytes, mutated_json, mutated_json)
    zipped = (saved(content), saved({"w": torch.randn(8)}))
    return {
        "checkpoint": Reader(".pth", zipped, (mutated_bytes, mutated_pickle, mutated_pickle), _read_checkpoint),
        "checkpoint, old format": Reader(".pth", (saved(content, zipped=False),), (mutated_bytes,), _read_checkpoint),
        "safetensors": Reader(".safetensors", (save(tensors),), (mutated_bytes, mutated_safetensors), _read_checkpoint),
        "annotations": Reader(".json", (json.dumps(annotations).encode(),), changes, _read_annotations),
        "annotations of a report": Reader(".json", (json.dumps(annotations).encode(),), changes, _read_truth),
        "results": Reader(".json", (json.dumps(results).encode(),), changes, _read_results),
        "ONNX metadata": Reader(".json", (json.dumps(metadata).encode(),), (mutated_entries,), _read_metadata),
        "image": Reader(".png", tuple(_encoded().values()), (mutated_bytes, mutated_header), _read_image),
        "folder": Reader(".json", (b"[]",), (any_folder,), _read_folder),
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


def fuzz(name: str, reader: Reader, *, seed: int, cases: int, folder: Path, isolated: bool = False) -> Target:
    """Runs cases 0 to `cases` of one reader, in child processes where `isolated`."""
    counts = {"cases": cases, "still valid": 0, "refused by name": 0}
    most = {"slowest, s": 0.0, "most memory, MB": 0.0}
    failures: list[str] = []
    start = 0
    while start < cases:
        numbers = range(start, min(start + BATCH, cases))
        batch = partial(_batch, name, reader, seed=seed, numbers=numbers, folder=folder)
        found = _in_child(batch) if isolated else batch()
        start = numbers.stop
        if isinstance(found, str):
            start = int((folder / "number").read_text()) + 1
            failures.append(f"{start - 1}: {found}")
            continue
        for key, outcome in (("still valid", "read"), ("refused by name", "refused")):
            counts[key] += found[outcome]
        most = {key: max(value, found[key]) for key, value in most.items()}
        failures += found["failures"]
    return Target(name, counts, tuple(failures), most)


def _batch(name: str, reader: Reader, *, seed: int, numbers: range, folder: Path) -> dict[str, Any]:
    """Outcomes of some cases, with the time of the slowest and by how much they made the process larger."""
    counts = {"read": 0, "refused": 0}
    failures, slowest, before = [], 0.0, _peak_megabytes()
    allowed = before + MEGABYTES_A_CASE
    for number in numbers:
        content = mutated(reader, name, seed, number)
        (folder / "number").write_text(str(number))
        began = time.process_time()
        outcome = run_case(reader, content, folder)
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > SECONDS_A_CASE:
            outcome = f"took {seconds:.0f} seconds"
        if (peak := _peak_megabytes()) > allowed:
            outcome, allowed = f"took {peak - before:.0f} MB", peak + MEGABYTES_A_CASE
        if outcome in counts:
            counts[outcome] += 1
        else:
            failures.append(f"{number}: {outcome}")
    grown = _peak_megabytes() - before
    return {**counts, "failures": failures, "slowest, s": round(slowest, 2), "most memory, MB": round(grown)}


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What `work` returns in a fork with limits of time and memory, or how the fork ended without it."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 600,) * 2)
            with os.fdopen(sending, "w") as pipe:
                json.dump(work(), pipe)
        except BaseException:  # nothing may go on in the fork
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else f"ended the process ({os.waitstatus_to_exitcode(status)})"


def main() -> int:
    """Returns 1 if anything else than the two allowed outcomes was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON record to write")
    parser.add_argument("--only", metavar="READER:NUMBER", help="run one case, with its traceback")
    args = parser.parse_args()
    # The threads of a process are not there in its forks.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    found = readers()
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
            fuzz(name, reader, seed=args.seed, cases=share, folder=folder, isolated=True)
            for name, reader in found.items()
        )
    command = shlex.join(["python", "-m", "tests.robustness.fuzz", *sys.argv[1:]])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = round(sum(one.ru_utime + one.ru_stime for one in used), 1)
    report = Trials(command, args.seed, seconds, this_machine(), targets)
    print(trials_markdown(report))
    for target in targets:
        print("\n".join(f"FAILED {target.name}:{failure}" for failure in target.failures[:20]))
    if args.out:
        write_trials(args.out, report)
    return int(any(target.failures for target in targets))


if __name__ == "__main__":
    sys.exit(main())
