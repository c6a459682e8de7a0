"""What the experiments share: their configs, data sets, commands and arguments."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from steps import Step, StepFailed, run_steps

from castling_det.compat.host import mmdet_tool

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / "configs"
# By the name in the configs' file names: where the data set lies, and its converter with the converter's arguments.
DATA = {
    "scores": (
        Path("data/scores_demo"),
        ["scores.py", "--paper", "80", "110", "--long-side", "640", "--splits", "train", "val", "--limit", "400"],
    ),
    "score-pages": (Path("data/scores"), ["scores.py"]),
    "tree-crowns": (Path("data/tree_crowns"), ["tree_crowns.py"]),
}


@cache
def resolved(config: Path) -> Any:
    """A config with its bases read."""
    from mmengine.config import Config

    return Config.fromfile(config)


def last_checkpoint(config: Path, options: Mapping[str, str]) -> str:
    """The name that mmengine gives the last checkpoint of a training with these `--cfg-options`."""
    train_cfg = resolved(config).train_cfg
    iters = options.get("train_cfg.max_iters") or train_cfg.get("max_iters")
    return f"iter_{iters}.pth" if iters else f"epoch_{train_cfg.max_epochs}.pth"


def python(script: str | Path) -> tuple[str, str]:
    """The beginning of a command that runs `script` with this interpreter."""
    return sys.executable, str(script)


def cfg_options(options: Mapping[str, str]) -> tuple[str, ...]:
    """The end of a command of MMDetection's."""
    return ("--cfg-options", *(f"{key}={value}" for key, value in options.items()))


@dataclass(frozen=True)
class Experiment:
    """What all experiments have in common: configs `MODEL_NAME_DATA.py`, a data set, and where results go."""

    work_dir: Path
    model: str
    """Folder under configs/ and beginning of the configs' names, such as `castling_vit/gfl_castling-vit-nano`."""
    data: str = "tree-crowns"
    data_root: Path | None = None
    """Where the data set lies; None is its own folder under data/."""

    def config(self, name: str) -> Path:
        """The config of one part, such as `castling`."""
        path = CONFIGS / f"{self.model}_{name}_{self.data}.py"
        if not path.is_file():
            raise ValueError(f"model={self.model!r}, data={self.data!r}: the config {path} is missing")
        return path

    def folder(self, seed: int, name: str) -> Path:
        """The work dir of one run."""
        return self.work_dir / f"seed{seed}" / name

    @property
    def root(self) -> Path:
        """Where the data set lies."""
        return self.data_root or DATA[self.data][0]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that are trained."""
        return tuple(resolved(self.config("softmax")).metainfo.classes)

    @property
    def annotations(self) -> tuple[Path, Path]:
        """Of training and validation; reports are about the latter."""
        return self.root / "annotations" / "train.json", self.root / "annotations" / "val.json"

    def _places(self) -> dict[str, str]:
        """What a config must be told when the data set does not lie where the config says."""
        if self.data_root is None:
            return {}
        loaders = {f"{stage}_dataloader.dataset.data_root": f"{self.root}/" for stage in ("train", "val", "test")}
        return loaders | {f"{stage}_evaluator.ann_file": str(self.annotations[1]) for stage in ("val", "test")}

    def train(
        self, seed: int, name: str, config: Path, options: Mapping[str, str], *, start: tuple[Step, Path] | None = None
    ) -> Step:
        """Trains `config` into the run's folder, with MMDetection's `--cfg-options`.

        `start` is a step and the weights to load that it writes. Without it an interrupted training goes on from its
        last checkpoint. With it, mmengine would go on from the weights as if they were that checkpoint: the training
        begins anew.
        """
        loaded = {"randomness.seed": str(seed)} | ({} if start is None else {"load_from": str(start[1])})
        command = (*python(mmdet_tool("train.py")), str(config), "--work-dir", str(self.folder(seed, name)))
        return Step(
            f"seed {seed}: train {name}",
            (
                *command,
                *(("--resume",) if start is None else ()),
                *cfg_options(loaded | self._places() | dict(options)),
            ),
            self.folder(seed, name),
            "train",
            inputs=(*self.annotations, *([] if start is None else [start[0].done])),
            settings=json.dumps(resolved(config).to_dict(), sort_keys=True, default=str),
            resumes=start is None,
        )

    def convert(self, name: str, config: Path, source: Path, target: Path, *options: str, after: Path) -> Step:
        """Makes the checkpoint `target` by tools/convert.py when the file `after` is there or has changed."""
        files = map(str, (config, source, target))
        command = (*python(TOOLS / "convert.py"), *options, *files, "--probe-images", str(self.root / "val"))
        return Step(name, command, target.parent, "convert", inputs=(after,))

    def test(
        self,
        seed: int,
        name: str,
        config: Path,
        weights: Path,
        options: Mapping[str, str] | None = None,
        *,
        after: Step,
    ) -> Step:
        """Evaluates the checkpoint `weights`, which the step `after` makes, into `test/` in the run's folder."""
        folder = self.folder(seed, name) / "test"
        written = {"test_evaluator.outfile_prefix": str(folder / "predictions")}
        command = (*python(mmdet_tool("test.py")), str(config), str(weights), "--work-dir", str(folder))
        settings = cfg_options(written | self._places() | dict(options or {}))
        return Step(f"seed {seed}: test {name}", (*command, *settings), folder, "test", inputs=(after.done,))

    def report(self, runs: Sequence[tuple[str, Path]], tests: Sequence[Step], *, baseline: str, deployed: str) -> Step:
        """Compares runs, each a name and a work dir, that `tests` evaluated."""
        command = (
            *python(TOOLS / "report.py"),
            *(part for name, folder in runs for part in ("--run", f"{name}={folder}")),
            *("--baseline", baseline, "--deployed", deployed),
            *("--ann", str(self.annotations[1]), "--images", str(self.root / "val")),
            *("--out", str(self.work_dir / "report")),
        )
        return Step("report", command, self.work_dir / "report", "report", inputs=tuple(step.done for step in tests))

    def check(self, *names: str) -> None:
        """Prepares the data set if it is missing, and checks it against the configs of these names.

        Raises:
            ValueError: nothing can be trained; says why.
        """
        from castling_det.datasets.checks import raise_for_problems
        from castling_det.datasets.config_checks import check_dataset

        prepare(self.root, DATA[self.data][1], self.annotations)
        for name in names:
            config = resolved(self.config(name)).copy()
            config.merge_from_dict(self._places())
            raise_for_problems(check_dataset(config), source=str(self.config(name)))
            # Formatted once here: trainings that begin together would read the half-written cache of the formatter.
            _ = config.pretty_text


def prepare(root: Path, converter: Sequence[str], annotations: Sequence[Path]) -> None:
    """Prepares a data set if one of its annotation files is missing; ValueError if that fails."""
    script, *options = converter
    command = [*python(TOOLS / "dataset_converters" / script), *options, "--root", str(root)]
    if not all(path.is_file() for path in annotations) and subprocess.run(command).returncode:
        raise ValueError(f"{annotations[0]} is missing; it is written by {' '.join(command[1:])}")


def common_arguments(doc: str | None, work_dir: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """A parser with the arguments of every experiment, and these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path(work_dir), help="where to write (default: %(default)s)")
    parser.add_argument("--data", choices=DATA, default="tree-crowns", help="the data set (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, help="where the data set lies (default: its folder under data/)")
    parser.add_argument(
        "--model",
        default="castling_vit/gfl_castling-vit-nano",
        help="folder and beginning of the names of configs MODEL_*_DATA.py under configs/ (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="one run for each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once, sharing the cores (default: 2)")
    return parser


def run_experiment(plan: Experiment, names: Sequence[str], steps: Callable[[], Sequence[Step]], *, jobs: int) -> int:
    """Checks data and configs, runs the steps, prints the report; 0 when every step succeeded."""
    try:
        plan.check(*names)
        run_steps(steps(), plan.work_dir, jobs=jobs)
    except (StepFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((plan.work_dir / "report" / "report.md").read_text(encoding="utf-8"))
    print(f"The page with plots and pictures: {plan.work_dir / 'report' / 'index.html'}")
    return 0
