"""Accuracy and latency of exported detectors.

    deployed.py accuracy CONFIG CHECKPOINT FILE.onnx ...   mAP of ONNX files beside PyTorch's, on the config's test data
    deployed.py latency SUBJECT SUBJECT ...                milliseconds from pixels to boxes, of any subjects
    deployed.py attentions CONFIG                          latency of linear beside softmax attention, in both runtimes

A subject is an ONNX file, run by onnxruntime, or `CONFIG:linear` or `CONFIG:softmax`, run by PyTorch with random
weights. Each is timed in fresh processes that take turns, A B A B, so that a busy machine slows all of them and a drift
shows between the rounds. Exit code 1 where a file loses accuracy or a subject fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
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
    """Side of the square image, in pixels."""
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    rounds_p50_ms: tuple[float, ...]
    """The median of each process, in their order."""
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
    subjects: Sequence[str], *, sizes: Sequence[int], rounds: int = 2, threads: int = 1, seconds: float = 5.0
) -> list[Latency]:
    """Times each subject at each size, in `rounds` fresh processes each that take turns.

    Args:
        subjects: ONNX files, or `CONFIG:linear` and `CONFIG:softmax`.
        sizes: sides of square images in pixels, multiples of the detectors' `pad_size_divisor`.
        seconds: of each process, beyond three calls.

    Returns:
        One row for each subject and size; a subject that fails has no times and says why.
    """
    rows = []
    for size in sizes:
        samples: dict[str, list[list[float]]] = {subject: [] for subject in subjects}
        problems: dict[str, str] = {}
        for _ in range(rounds):
            for subject in subjects:
                if subject in problems:
                    continue
                command = [sys.executable, __file__, "worker", subject, str(size), str(threads), str(seconds)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    problems[subject] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                else:
                    samples[subject].append(json.loads(done.stdout.splitlines()[-1]))
        rows += [_latency(subject, size, samples[subject], problems.get(subject, "")) for subject in subjects]
    return rows


def _latency(subject: str, size: int, rounds: list[list[float]], problem: str) -> Latency:
    if problem:
        return Latency(subject, size, None, None, None, (), problem)
    p20, p50, p80 = np.percentile(np.concatenate(rounds) * 1e3, (20, 50, 80)).round(3).tolist()
    medians = tuple(round(float(np.median(samples)) * 1e3, 3) for samples in rounds)
    return Latency(subject, size, p20, p50, p80, medians)


def worker(subject: str, size: int, threads: int, seconds: float) -> list[float]:
    """Seconds of each call, in this process; the first call is not counted."""
    call = _onnx_call(subject, threads) if subject.endswith(".onnx") else _torch_call(subject, threads)
    images = np.random.default_rng(0).integers(0, 256, (1, 3, size, size)).astype(np.float32)
    call(images)
    found: list[float] = []
    while len(found) < LEAST_CALLS or sum(found) < seconds:
        start = time.perf_counter()
        call(images)
        found.append(time.perf_counter() - start)
    return found


def _onnx_call(file: str, threads: int) -> Callable[[Any], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


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
        head = ["subject", "size", "p20 ms", "p50 ms", "p80 ms", "p50 of each process"]
    body = [list(map(_cell, _cells(row))) for row in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body)]
    return "\n".join([*lines, *(f"- {row.problem}" for row in rows if row.problem)])


def _cells(row: Accuracy | Latency) -> list[Any]:
    if isinstance(row, Accuracy):
        megabytes = f"{row.bytes / 1e6:.2f}"
        figures = f"{row.map:.4f}", f"{row.map50:.4f}", f"{row.difference:+.4f}"
        return [row.name, row.runtime, row.precision, megabytes, *figures]
    rounds = " ".join(f"{milliseconds:.1f}" for milliseconds in row.rounds_p50_ms)
    return [row.subject, row.size, row.p20_ms, row.p50_ms, row.p80_ms, rounds]


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
        print(json.dumps(worker(given[1], int(given[2]), int(given[3]), float(given[4]))))
        return 0
    args = parse_args(given)
    from castling_det.files import write_json, write_text
    from castling_det.report.records import this_machine

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
                rows = measure(subjects, **options)
    except (ValueError, OSError) as error:
        print(f"deployed: {error}", file=sys.stderr)
        return 1
    command = f"python {os.path.relpath(__file__)} {shlex.join(given)}"
    machine = asdict(this_machine())
    said = f"{table(rows)}\n\n`{command}`\n\n{', '.join(f'{name} {value}' for name, value in machine.items())}\n"
    print(said)
    if args.out:
        record = {"command": command, "machine": machine, "rows": [asdict(row) for row in rows]}
        write_json(args.out / f"{args.command}.json", record)
        write_text(args.out / f"{args.command}.md", said)
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
