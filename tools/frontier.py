"""The study of accuracy at equal cost, docs/frontier.md. Goes on where it was interrupted.

Trainings, exports and mAP may share the machine with other work (`--accuracy`); latencies may not (`--latency`, after
it). Without either, both are done. `--summary` writes results/frontier/ and the figure again from what was measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from experiments import Experiment, common_arguments, last_checkpoint, prepare, python
from steps import Step, StepFailed, run_steps

from castling_det.files import sha256_of, write_json

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))
PARTS = TOOLS / "benchmarks" / "equal_cost.py"
SHEETS = Path("data/score_sheets")
SHEET_OPTIONS = ("--paper", "256", "352", "--long-side", "2048", "--splits", "train", "test", "--limit", "24")
SHEET_SIZE, TILE = 2048, 640


@dataclass(frozen=True)
class Run:
    """One detector for one size of page."""

    attention: str
    size: int
    seed: int

    @property
    def name(self) -> str:
        """Of its work dir."""
        return f"{self.attention}-{self.size}"

    @property
    def hybrid(self) -> bool:
        """It is trained as the hybrid, and converted."""
        return self.attention.startswith("castling")


# In the order in which they are trained.
PRIMARY = (("castling", 1280), ("softmax", 640), ("castling", 896), ("softmax", 448), ("castling", 640))
SINGLE_SEED = (
    *(("softmax", 896), ("softmax-window", 896), ("castling-progressive", 1280), ("softmax", 320), ("castling", 448)),
    *(("softmax-window", 1280), ("castling", 320), ("linear", 1280), ("softmax-window", 640), ("linear", 640)),
)
SHEET_RUN = Run("castling", 1280, 0)


def _page_options(size: int) -> dict[str, str]:
    # Whole pages in softmax attention would take longer to validate than to train.
    nothing = {f"val_{part}": "None" for part in ("cfg", "dataloader", "evaluator")}
    return {"train_dataloader.dataset.pipeline.2.scale": f"({size},{size})", **nothing}


def _tile_options(size: int) -> dict[str, str]:
    """The demo's recipe in a third of its iterations; what is too small to be learned, in the tile's own pixels."""
    iters, pipeline = 800, "train_dataloader.dataset.pipeline"
    width = f"{9 * size / 192:g}"
    sizes = {f"{pipeline}.4.scale": f"({size},{size})", f"{pipeline}.6.min_gt_bbox_wh": f"({width},{width})"}
    schedule = {"param_scheduler.1.end": str(iters), "param_scheduler.1.T_max": str(iters - 40)}
    schedule |= {"train_cfg.max_iters": str(iters), "default_hooks.checkpoint.interval": str(iters // 2)}
    return _page_options(size) | sizes | schedule


@dataclass(frozen=True)
class Material:
    """What the detectors are trained for and tested on."""

    runs: tuple[Run, ...]
    split: str
    test_every: int
    """Every so many images of the split are tested on."""
    options: Callable[[int], dict[str, str]]
    """`--cfg-options` of a training for one size."""
    compared: tuple[int, ...]
    """Sizes of softmax at whose cost the linear detector is compared."""
    work_dir: str
    sheets: bool = False


MATERIALS = {
    "score-pages": Material(
        (*(Run(*key, seed) for seed in (0, 1, 2) for key in PRIMARY), *(Run(*key, 0) for key in SINGLE_SEED)),
        "test",
        4,
        _page_options,
        (448, 640),
        "work_dirs/frontier",
        sheets=True,
    ),
    "tree-crowns": Material(
        tuple(
            Run(attention, size, seed)
            for seed in (0, 1, 2)
            for size in (192, 256, 384, 512)
            for attention in ("castling", "softmax")
        ),
        "val",
        1,
        _tile_options,
        (256, 384, 512),
        "work_dirs/frontier_tree_crowns",
    ),
}


@dataclass(frozen=True)
class Study:
    """The steps of the study."""

    plan: Experiment

    @property
    def material(self) -> Material:
        """By the name of the data set."""
        return MATERIALS[self.plan.data]

    @property
    def pages(self) -> Path:
        """The annotations of the images that are tested on."""
        return self.plan.work_dir / "pages.json"

    def train(self, run: Run) -> Step:
        """One training, for its size of page."""
        options = self.material.options(run.size)
        return self.plan.train(run.seed, run.name, self.plan.config(run.attention), options)

    def accuracy(self, run: Run) -> list[Step]:
        """Training, conversion of a hybrid, export, boxes, and mAP."""
        train = self.train(run)
        config, options = self.plan.config(run.attention), self.material.options(run.size)
        weights, steps, folder = train.folder / last_checkpoint(config, options), [train], train.folder
        if run.hybrid:
            deployed = folder / "deploy" / "deploy.pth"
            hybrid = self.plan.config("castling")
            steps.append(self.plan.convert(f"{_of(run)}: convert", hybrid, weights, deployed, after=train.done))
            config, weights = self.plan.config("deploy"), deployed
        file = folder / "onnx" / "detector.onnx"
        steps.append(self._export(run, config, weights, run.size, file, steps[-1]))
        images = self.plan.root / self.material.split
        steps.append(self._predict(run, file, self.pages, images, folder / "boxes", steps[-1]))
        steps.append(self._draws(run, self.pages, folder / "boxes" / "boxes.json", steps[-1]))
        return steps

    def accuracies(self, runs: Sequence[Run]) -> list[Step]:
        """All runs on the test images, and one of them on larger sheets."""
        steps = [step for run in runs for step in self.accuracy(run)]
        if not self.material.sheets:
            return steps
        deployed = self.plan.folder(SHEET_RUN.seed, SHEET_RUN.name) / "deploy"
        after = next(step for step in steps if step.folder == deployed)
        annotations, images = SHEETS / "annotations" / "test.json", SHEETS / "test"
        for way, size, tile in (("sheet", SHEET_SIZE, ()), ("tiles", TILE, (str(TILE),))):
            folder = self.plan.folder(SHEET_RUN.seed, f"{SHEET_RUN.name}-{way}")
            file = folder / "onnx" / "detector.onnx"
            made = self._export(SHEET_RUN, self.plan.config("deploy"), deployed / "deploy.pth", size, file, after, way)
            found = self._predict(SHEET_RUN, file, annotations, images, folder / "boxes", made, *tile, way=way)
            steps += [made, found, self._draws(SHEET_RUN, annotations, folder / "boxes" / "boxes.json", found, way)]
        return steps

    def _export(self, run: Run, config: Path, weights: Path, size: int, file: Path, after: Step, way: str = "") -> Step:
        command = (*python(PARTS), "export", str(config), str(weights), str(size), str(file))
        return Step(f"{_of(run, way)}: export", command, file.parent, "export", inputs=(after.done,))

    def _predict(
        self,
        run: Run,
        file: Path,
        annotations: Path,
        images: Path,
        folder: Path,
        after: Step,
        *tile: str,
        way: str = "",
    ) -> Step:
        command = (*python(PARTS), "predict", str(file), str(annotations), str(images), str(folder / "boxes.json"))
        return Step(f"{_of(run, way)}: boxes", (*command, *tile), folder, "predict", inputs=(after.done, annotations))

    def _draws(self, run: Run, annotations: Path, results: Path, after: Step, way: str = "") -> Step:
        folder = results.parents[1] / "map"
        classes = self.plan.classes
        command = (*python(PARTS), "draws", str(annotations), str(results), str(folder / "draws.npz"), *classes)
        return Step(f"{_of(run, way)}: mAP", command, folder, "draws", inputs=(after.done, annotations))


def _of(run: Run, way: str = "") -> str:
    return f"seed {run.seed}: {run.name}{way and ' ' + way}"


def write_pages(source: Path, target: Path, every: int) -> None:
    """Every so many images, in the order of their ids."""
    document: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    images = sorted(document["images"], key=lambda image: image["id"])[::every]
    kept = {image["id"] for image in images}
    boxes = [box for box in document["annotations"] if box["image_id"] in kept]
    write_json(target, {**document, "images": images, "annotations": boxes})


def measure(study: Study, runs: Sequence[Run], *, rounds: int, seconds: float) -> None:
    """Latencies of the files of seed 0, each in fresh processes that take turns."""
    files = [str(study.plan.folder(0, run.name) / "onnx" / "detector.onnx") for run in runs if run.seed == 0]
    command = [
        *python(TOOLS / "benchmarks" / "deployed.py"),
        "latency",
        *files,
        "--images",
        str(study.plan.root / study.material.split),
    ]
    command += ["--rounds", str(rounds), "--seconds", str(seconds), "--threads", "2"]
    if subprocess.run([*command, "--out", str(study.plan.work_dir / "latency")]).returncode:
        raise StepFailed("latencies could not be measured; see above")


def summarise(study: Study, runs: Sequence[Run]) -> None:
    """Writes the record under results/frontier/ and the figure of the docs, of all runs that were evaluated."""
    from castling_det.report.records import this_machine
    from tools.benchmarks.equal_cost import multiply_adds
    from tools.benchmarks.frontier_record import Record, Row, Way, duplicates, figure, gains_of

    latency = json.loads((study.plan.work_dir / "latency" / "latency.json").read_text(encoding="utf-8"))
    timed = {row["subject"]: row for row in latency["rows"]}
    document = json.loads(study.pages.read_text(encoding="utf-8"))
    image = document["images"][0]
    rows, values = [], {}
    for run in runs:
        folder = study.plan.folder(run.seed, run.name)
        file, draws = folder / "onnx" / "detector.onnx", np.load(folder / "map" / "draws.npz")
        key = run.attention, run.size, run.seed
        values[key] = draws["values"]
        config = study.plan.config("deploy" if run.hybrid else run.attention)
        times = timed.get(str(file), {"p50_ms": None, "rounds_p50_ms": [], "peak_mib": None})
        rows.append(
            Row(
                *key,
                map=round(float(values[key][0]), 4),
                map50=round(float(draws["map50"]), 4),
                gmacs=round(multiply_adds(str(config), run.size, (image["height"], image["width"])), 3),
                training_minutes=round(json.loads((folder / "train.done.json").read_text())["seconds"] / 60, 1),
                onnx_sha256=sha256_of(file),
                p50_ms=times["p50_ms"],
                rounds_p50_ms=tuple(times["rounds_p50_ms"]),
                peak_mib=times["peak_mib"],
            )
        )
    ways = []
    for way in ("sheet", "tiles") if study.material.sheets else ():
        folder = study.plan.folder(0, f"{SHEET_RUN.name}-{way}")
        boxes = json.loads((folder / "boxes" / "boxes.json").read_text(encoding="utf-8"))
        seconds = json.loads((folder / "boxes" / "boxes.seconds.json").read_text(encoding="utf-8"))
        found = float(np.load(folder / "map" / "draws.npz")["values"][0])
        ways.append(Way(way, round(found, 4), float(np.median(seconds)), round(duplicates(boxes) / len(seconds), 2)))
    names = {row["id"] for row in document["categories"] if row["name"] in study.plan.classes}
    record = Record(
        command=" ".join(("tools/frontier.py", "--data", study.plan.data)),
        machine=this_machine(),
        sentinel_ms=tuple(latency["sentinel_ms"]),
        pages=len(document["images"]),
        boxes=sum(box["category_id"] in names for box in document["annotations"]),
        rows=tuple(rows),
        gains=gains_of(rows, values, study.material.compared),
        sheets=tuple(ways),
    )
    name = study.plan.data.replace("-", "_")
    write_json(TOOLS.parent / "results" / "frontier" / f"{name}.json", msgspec.to_builtins(record))
    figure(record, TOOLS.parent / "docs" / "images" / f"frontier_{name}.png")


def main() -> int:
    """Runs the study; 0 when every step succeeded."""
    parser = common_arguments(__doc__, "", [0, 1, 2])
    parser.set_defaults(data="score-pages", work_dir=None)
    for name, text in (("trainings", "trainings alone"), ("accuracy", "all but latencies"), ("latency", "latencies")):
        parser.add_argument(f"--{name}", action="store_true", help=f"{text}, and stop")
    parser.add_argument("--summary", action="store_true", help="write the record and the figure again, and stop")
    args = parser.parse_args()
    if args.data not in MATERIALS:
        parser.error(f"--data {args.data}: expected one of {', '.join(MATERIALS)}")
    work_dir = args.work_dir or Path(MATERIALS[args.data].work_dir)
    study = Study(Experiment(work_dir, args.model, args.data, args.data_root))
    runs = [run for run in study.material.runs if run.seed in args.seeds]
    everything = not (args.trainings or args.accuracy or args.latency or args.summary)
    try:
        if args.trainings or args.accuracy or everything:
            study.plan.check("softmax", "castling")
            steps = [study.train(run) for run in runs]
            run_steps(steps, work_dir, jobs=args.jobs)
        if args.accuracy or everything:
            material = study.material
            source = study.plan.root / "annotations" / f"{material.split}.json"
            write_pages(source, study.pages, material.test_every)
            if material.sheets:
                prepare(SHEETS, ["scores.py", *SHEET_OPTIONS], [SHEETS / "annotations" / "test.json"])
            run_steps(study.accuracies(runs), work_dir, jobs=args.jobs)
        if args.latency or everything:
            measure(study, runs, rounds=3, seconds=4.0)
        if args.summary or args.latency or everything:
            summarise(study, runs)
    except (StepFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
