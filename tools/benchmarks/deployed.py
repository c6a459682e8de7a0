"""Accuracy and latency of exported detectors.

    deployed.py accuracy CONFIG CHECKPOINT FILE.onnx ...   mAP of ONNX files beside PyTorch's, on the config's test data
    deployed.py latency SUBJECT SUBJECT ...                milliseconds from pixels to boxes, of any subjects;
                                                           with --images FOLDER of ONNX files on real images
    deployed.py attentions CONFIG                          latency of linear beside softmax attention, in both runtimes

A subject is an ONNX file, run by onnxruntime, or `CONFIG:linear` or `CONFIG:softmax`, run by PyTorch with random
weights. Each is timed in fresh processes that take turns, A B A B, so that a busy machine slows all of them and a drift
shows between the rounds; a fixed matrix product is timed before and after. Exit code 1 where a file loses accuracy or
a subject fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

LIMITS = {"float32": 0.001, "float16": 0.005, "int8": None}
"""How far mAP may be from PyTorch's."""
LEAST_CALLS = 3


@dataclass(frozen=True)
class Accuracy:
    """One model on one test set; mAP in [0, 1]."""

    name: str
    runtime: str
    precision: str
    bytes: int
    map: float
    map50: float
    difference: float = 0.0
    """Of mAP to PyTorch's."""

    @property
    def problem(self) -> str:
        """One line where mAP is further from PyTorch's than the precision allows."""
        limit = LIMITS[self.precision]
        wrong = limit is not None and abs(self.difference) > limit
        return f"{self.name}: mAP differs by {self.difference:+.4f}, allowed {limit:g}" if wrong else ""


@dataclass(frozen=True)
class Latency:
    """One subject at one size."""

    subject: str
    size: int
    """Side of the square image, in pixels; 0: images of a folder, in the size that the file gives them."""
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    rounds_p50_ms: tuple[float, ...]
    """The median of each process, in their order."""
    peak_mib: float | None = None
    """Most memory that a process held, with Python and the model."""
    problem: str = ""


def evaluate(
    model: Path, annotations: Path, images: Path, *, config: str | None = None, reference: Accuracy | None = None
) -> Accuracy:
    """mAP of an ONNX file, or of a checkpoint with its config, one image at a time.

    Args:
        model: the file.
        annotations: COCO's, of the test set.
        images: the folder that `file_name` is below.
        config: of a checkpoint.
        reference: PyTorch's accuracy, to compare with.

    Raises:
        ValueError: a file that cannot be used, or annotations without a class that the detector knows.
    """
    from castling_det.report.evaluation import evaluate_boxes
    from castling_det.runtime.detector import Detector
    from castling_det.runtime.onnx_detector import OnnxDetector

    detector = Detector(model, config)
    try:
        document = json.loads(annotations.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"annotations {annotations}: cannot be read ({error})") from error
    ids = {str(category["name"]): int(category["id"]) for category in document["categories"]}
    if missing := [name for name in detector.classes if name not in ids]:
        raise ValueError(f"annotations {annotations}: no category {', '.join(missing)}, which the detector knows")
    categories = tuple(ids[name] for name in detector.classes)
    results: list[dict[str, Any]] = []
    for image in document["images"]:
        results += detector(images / image["file_name"]).to_coco(image["id"], categories)
    metrics = evaluate_boxes(document, results).metrics
    figures = metrics["mAP"] or 0.0, metrics["mAP50"] or 0.0
    backend, size = detector.backend, model.stat().st_size
    if isinstance(backend, OnnxDetector):
        runtime, precision = "onnxruntime", backend.info.precision
    else:
        runtime, precision = "PyTorch", "float32"
    difference = figures[0] - reference.map if reference else 0.0
    return Accuracy(model.name, runtime, precision, size, *figures, difference)


def compare(config: str, checkpoint: Path, files: Sequence[Path]) -> list[Accuracy]:
    """The checkpoint with PyTorch, then each ONNX file, on the config's test data."""
    from castling_det.config import load_config

    dataset = load_config(config).test_dataloader.dataset
    root = Path(dataset.get("data_root") or "")
    annotations, images = root / dataset.ann_file, root / dataset.get("data_prefix", {}).get("img", "")
    reference = evaluate(checkpoint, annotations, images, config=config)
    return [reference, *(evaluate(file, annotations, images, reference=reference) for file in files)]


def measure(
    subjects: Sequence[str],
    *,
    sizes: Sequence[int],
    rounds: int = 2,
    threads: int = 1,
    seconds: float = 5.0,
    images: Path | None = None,
) -> list[Latency]:
    """Times each subject at each size, in `rounds` fresh processes each that take turns.

    Args:
        subjects: ONNX files, or `CONFIG:linear` and `CONFIG:softmax`.
        sizes: sides of square images in pixels, multiples of the detectors' `pad_size_divisor`.
        seconds: of each process, beyond three calls.
        images: a folder; the ONNX files are timed on its images, as read, instead of random squares of `sizes`.

    Returns:
        One row for each subject and size; a subject that fails has no times and says why.
    """
    rows = []
    for size in sizes if images is None else (0,):
        samples: dict[str, list[Any]] = {subject: [] for subject in subjects}
        problems: dict[str, str] = {}
        for _ in range(rounds):
            for subject in subjects:
                if subject in problems:
                    continue
                command = [sys.executable, __file__, "worker", subject, str(size), str(threads), str(seconds)]
                command += [] if images is None else [str(images)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    problems[subject] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                else:
                    samples[subject].append(json.loads(done.stdout.splitlines()[-1]))
        rows += [_latency(subject, size, samples[subject], problems.get(subject, "")) for subject in subjects]
    return rows


def _latency(subject: str, size: int, rounds: list[Any], problem: str) -> Latency:
    if problem:
        return Latency(subject, size, None, None, None, (), problem=problem)
    every = np.concatenate([done["seconds"] for done in rounds]) * 1e3
    p20, p50, p80 = np.percentile(every, (20, 50, 80)).round(3).tolist()
    medians = tuple(round(float(np.median(done["seconds"])) * 1e3, 3) for done in rounds)
    return Latency(subject, size, p20, p50, p80, medians, round(max(done["peak_mib"] for done in rounds), 1))


def worker(subject: str, size: int, threads: int, seconds: float, folder: str | None = None) -> dict[str, Any]:
    """Seconds of each call in this process and the most memory it held; the first call is not counted."""
    if folder is not None:
        call, inputs = _detector_call(subject, threads), _some_images(Path(folder))
    else:
        call = _onnx_call(subject, threads) if subject.endswith(".onnx") else _torch_call(subject, threads)
        inputs = [np.random.default_rng(0).integers(0, 256, (1, 3, size, size)).astype(np.float32)]
    call(inputs[0])
    found: list[float] = []
    while len(found) < LEAST_CALLS or sum(found) < seconds:
        image = inputs[len(found) % len(inputs)]
        start = time.perf_counter()
        call(image)
        found.append(time.perf_counter() - start)
    return {"seconds": found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def sentinel() -> float:
    """Milliseconds of a fixed product of matrices, the best of 20: higher where other work slows the machine."""
    matrix = np.ones((512, 512), dtype=np.float32)
    return round(min(timeit.repeat(lambda: matrix @ matrix, number=5, repeat=20)) / 5 * 1e3, 3)


def _some_images(folder: Path, count: int = 8) -> list[Any]:
    """Images of a folder, evenly spread over its names in order."""
    from castling_det.runtime.sources import read_image

    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise ValueError(f"--images {folder}: no file in it")
    return [read_image(file) for file in files[:: max(1, len(files) // count)][:count]]


def _session(file: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _onnx_call(file: str, threads: int) -> Callable[[Any], object]:
    session = _session(file, threads)
    return lambda images: session.run(None, {"images": images})


def _detector_call(file: str, threads: int) -> Callable[[Any], object]:
    """From pixels as read to boxes in the image, by the detector that users have."""
    from castling_det.runtime.detector import Detector

    detector = Detector(file)
    detector.backend._session = _session(file, threads)  # type: ignore[attr-defined]
    return detector


def _torch_call(subject: str, threads: int) -> Callable[[Any], object]:
    import torch

    torch.set_num_threads(threads)
    network = _network(subject)
    return torch.no_grad()(lambda images: network(torch.from_numpy(images)))


def _network(subject: str) -> Any:
    import torch

    from castling_det.config import load_config
    from castling_det.conversion.detectors import build_detector, with_attention
    from castling_det.export.network import DeployedDetector

    config, _, attention = subject.rpartition(":")
    if attention not in ("linear", "softmax") or not config:
        raise ValueError(f"subject {subject}: expected an .onnx file, CONFIG:linear or CONFIG:softmax")
    torch.manual_seed(0)
    return DeployedDetector(build_detector(with_attention(load_config(config), attention))).eval()


def export_attentions(config: str, folder: Path) -> list[str]:
    """ONNX files of a config's detector with either attention and random weights; they are not checked."""
    from castling_det.export.graph import finished, onnx_model, trace
    from castling_det.runtime.metadata import OUTPUT_NAMES

    files = []
    for attention in ("linear", "softmax"):
        model = onnx_model(trace(_network(f"{config}:{attention}")))
        content = finished(model, list(OUTPUT_NAMES), int8=False, properties={}).SerializeToString()
        (folder / f"{attention}.onnx").write_bytes(content)
        files.append(str(folder / f"{attention}.onnx"))
    return files


def table(rows: Sequence[Accuracy | Latency]) -> str:
    """The rows as Markdown."""
    if isinstance(rows[0], Accuracy):
        head = ["file", "runtime", "precision", "MB", "mAP", "mAP50", "mAP - PyTorch"]
    else:
        head = ["subject", "size", "p20 ms", "p50 ms", "p80 ms", "p50 of each process", "peak MiB"]
    body = [list(map(_cell, _cells(row))) for row in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body)]
    return "\n".join([*lines, *(f"- {row.problem}" for row in rows if row.problem)])


def _cells(row: Accuracy | Latency) -> list[Any]:
    if isinstance(row, Accuracy):
        megabytes = f"{row.bytes / 1e6:.2f}"
        figures = f"{row.map:.4f}", f"{row.map50:.4f}", f"{row.difference:+.4f}"
        return [row.name, row.runtime, row.precision, megabytes, *figures]
    rounds = " ".join(f"{milliseconds:.1f}" for milliseconds in row.rounds_p50_ms)
    return [row.subject, row.size, row.p20_ms, row.p50_ms, row.p80_ms, rounds, row.peak_mib]


def _cell(value: Any) -> str:
    return "failed" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    accuracy = commands.add_parser("accuracy", help="mAP of ONNX files beside PyTorch's")
    accuracy.add_argument("config", help="deploy config")
    accuracy.add_argument("checkpoint", type=Path, help="the checkpoint that the files were exported from")
    accuracy.add_argument("files", nargs="+", type=Path, help="ONNX files of tools/export_onnx.py")
    latency = commands.add_parser("latency", help="milliseconds of ONNX files or configs")
    latency.add_argument("subjects", nargs="+", help="FILE.onnx, CONFIG:linear or CONFIG:softmax")
    latency.add_argument("--images", type=Path, help="time ONNX files on images of this folder, not on --sizes")
    attentions = commands.add_parser("attentions", help="linear beside softmax, in PyTorch and onnxruntime")
    attentions.add_argument("config", help="a detector's config, of any attention")
    for timed in (latency, attentions):
        timed.add_argument("--sizes", nargs="+", type=int, default=[320, 640, 1024, 1536], help="sides in pixels")
        timed.add_argument("--rounds", type=int, default=2, help="processes of each subject (2)")
        timed.add_argument("--threads", type=int, default=2, help="of torch and onnxruntime (2)")
        timed.add_argument("--seconds", type=float, default=5.0, help="of each process, beyond three calls (5)")
    for command in (accuracy, latency, attentions):
        command.add_argument("--out", type=Path, help="folder for COMMAND.json and COMMAND.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates or measures; see the exit codes above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["worker"]:
        print(json.dumps(worker(given[1], int(given[2]), int(given[3]), float(given[4]), *given[5:])))
        return 0
    args = parse_args(given)
    from castling_det.files import write_json, write_text
    from castling_det.report.records import this_machine

    idle: dict[str, list[float]] = {}
    try:
        rows: Sequence[Accuracy | Latency]
        if args.command == "accuracy":
            rows = compare(args.config, args.checkpoint, args.files)
        else:
            with tempfile.TemporaryDirectory() as folder:
                if args.command == "latency":
                    subjects = args.subjects
                else:
                    files = export_attentions(args.config, Path(folder))
                    subjects = [f"{args.config}:linear", f"{args.config}:softmax", *files]
                options = {name: getattr(args, name) for name in ("sizes", "rounds", "threads", "seconds")}
                before = sentinel()
                rows = measure(subjects, images=getattr(args, "images", None), **options)
                idle = {"sentinel_ms": [before, sentinel()]}
    except (ValueError, OSError) as error:
        print(f"deployed: {error}", file=sys.stderr)
        return 1
    command = f"python {os.path.relpath(__file__)} {shlex.join(given)}"
    machine = asdict(this_machine())
    said = f"{table(rows)}\n\n`{command}`\n\n{', '.join(f'{name} {value}' for name, value in machine.items())}\n"
    print(said)
    if args.out:
        record = {"command": command, "machine": machine, **idle, "rows": [asdict(row) for row in rows]}
        write_json(args.out / f"{args.command}.json", record)
        write_text(args.out / f"{args.command}.md", said)
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
