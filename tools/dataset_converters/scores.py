"""Prepares the engraved scores: pages of real music with the box of every symbol, written as COCO JSON.

Three wheels of the package index are downloaded, pinned by SHA-256, and read without being installed: music21 holds
the encoded compositions, verovio engraves them, resvg draws the engraving. Categories are SMuFL names. A symbol's box
comes from the font's own table, so it is exact, and it follows the rotation of the page.

Under the root lie `annotations/{train,val,test,test_petaluma}.json` for the pages in folders of the same names. No
composer is on two sides: see COLLECTIONS. Pages are set in four fonts; `test_petaluma` shows pieces of `test` in a
fifth, hand-drawn one. Each page is degraded as a scan is: rotation up to 1 degree, blur, noise, uneven light.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from common import PreparationError, prepare_folder
from engraving import FONTS, UNSEEN_FONT, Engraver, Job, Symbol
from rich.console import Console
from rich.progress import track
from rich.table import Table

from castling_det.files import sha256_of, write_json

REQUIREMENTS = Path(__file__).with_suffix(".txt")
MIN_TRAIN_BOXES = 200
# About the pages of the whole data set: a limit takes its share of every piece.
PAGES = {"train": 1250, "val": 62, "test": 430, "test_petaluma": 140}
TUNES_PER_JOB = 10
# verovio 6.4.1 ends the process on this one.
UNREADABLE = {"LillibulleroOrProtestantBoys.abc"}
SPLITS = tuple(PAGES)
# Raise it when the output changes for the same settings: folders that were made before are then made anew.
LAYOUT = 1


@dataclass(frozen=True)
class Collection:
    """A folder of music21's corpus; its terms stand in docs/scores.md."""

    name: str
    split: str
    pages_per_piece: int
    suffixes: tuple[str, ...] = (".mxl",)


COLLECTIONS = (
    Collection("ryansMammoth", "train", 20, (".abc",)),
    Collection("beethoven", "train", 40),
    Collection("schumann_robert", "train", 24),
    Collection("josquin", "train", 20, (".abc",)),
    Collection("beach", "train", 20, (".musicxml",)),
    Collection("johnson_j_r", "train", 20),
    Collection("liliuokalani", "train", 20),
    Collection("haydn", "val", 8),
    Collection("mozart", "test", 15),
    Collection("trecento", "test", 3, (".mxl", ".xml")),
    Collection("schumann_clara", "test", 10),
    Collection("weber", "test", 20),
    Collection("luca", "test", 10, (".xml",)),
)


def download_wheels(cache: Path) -> dict[str, Path]:
    """The pinned wheels by project, from `cache` or the package index; pip compares the hashes.

    Raises:
        PreparationError: pip fails.
    """
    pins = REQUIREMENTS.read_text(encoding="utf-8")
    projects = re.findall(r"^([\w-]+)==", pins, re.MULTILINE)

    def found() -> dict[str, Path]:
        files = [path for path in sorted(cache.glob("*.whl")) if sha256_of(path) in pins]
        return {name: path for name in projects for path in files if path.name.startswith(f"{name.replace('-', '_')}-")}

    wheels = found()
    if len(wheels) < len(projects):
        cache.mkdir(parents=True, exist_ok=True)
        # Only data are read from music21, so it does not matter which Pythons its code runs on.
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--quiet"]
        command += ["--dest", str(cache), "--requirement", str(REQUIREMENTS)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = found()
        if run.returncode or len(wheels) < len(projects):
            raise PreparationError(
                f"pip could not download {', '.join(projects)} (exit code {run.returncode}). Check the connection to "
                f"the package index, or run `pip download --no-deps --requirement {REQUIREMENTS}` on a machine with a "
                f"connection and copy the wheels to {cache}. pip says:\n{run.stderr[-1000:]}"
            )
    return wheels


def list_jobs(corpus: zipfile.ZipFile, splits: Sequence[str], limit: int | None) -> list[Job]:
    """The jobs of these splits; with a limit the first of each collection in turn."""
    jobs = [job for collection in COLLECTIONS for job in _jobs_of(corpus, collection)]
    for job in [job for job in jobs if job.split == "test"]:
        jobs.append(job._replace(split="test_petaluma", font=UNSEEN_FONT, max_pages=-(-job.max_pages // 4)))
    if limit is None:
        # Two of three short pieces are enough in the fifth font.
        full = [job for job in jobs if job.split != "test_petaluma" or job.max_pages > 1 or job.number % 3]
        return [job for job in full if job.split in splits]
    short = []
    for split in splits:
        share = min(1.0, limit / PAGES[split])
        rounds = sorted((job for job in jobs if job.split == split), key=lambda job: job.number)
        pages = 0
        while rounds and pages < 1.25 * limit + 2:  # some jobs give fewer pages, or none
            job = rounds.pop(0)
            short.append(job._replace(max_pages=max(1, round(share * job.max_pages))))
            pages += short[-1].max_pages
    return short


def _jobs_of(corpus: zipfile.ZipFile, collection: Collection) -> Iterator[Job]:
    prefix = f"music21/corpus/{collection.name}/"
    members = [
        name
        for name in sorted(corpus.namelist())
        if name.startswith(prefix) and name.endswith(collection.suffixes) and name.split("/")[-1] not in UNREADABLE
    ]
    size = TUNES_PER_JOB if ".abc" in collection.suffixes else 1
    for number, start in enumerate(range(0, len(members), size)):
        group, font = tuple(members[start : start + size]), FONTS[number % len(FONTS)]
        yield Job(collection.name, collection.split, number, group, font, collection.pages_per_piece)


_engraver: Engraver | None = None  # each process's own


def _start_process(*arguments: Any) -> None:
    global _engraver
    _engraver = Engraver(*arguments)


def _save_pages(job: Job, folder: Path) -> list[tuple[dict[str, Any], list[Symbol]]]:
    """Writes a job's pages; returns what COCO says of each image, less its id, and the symbols."""
    assert _engraver is not None
    saved = []
    for number, page in enumerate(itertools.islice(_engraver.pages(job), job.max_pages)):
        name = f"{job.name}_{number:02d}.jpg"
        cv2.imwrite(str(folder / job.split / name), page.pixels, [cv2.IMWRITE_JPEG_QUALITY, 65])
        height, width = page.pixels.shape
        image = {"file_name": name, "width": width, "height": height, "collection": job.collection, "font": job.font}
        saved.append((image, page.symbols))
    return saved


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data set.

    Raises:
        ValueError: a setting is out of its range.
    """

    paper: tuple[int, int] = (160, 220)
    """Width and height of a page in mm; the music keeps its size."""
    long_side: int = 1280
    """Longer side of a page in pixels."""
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None
    """At most so many pages of each split."""

    def __post_init__(self) -> None:
        smallest = (("paper", min(self.paper), 60), ("long_side", self.long_side, 256), ("limit", self.limit, 1))
        for name, value, least in smallest:
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if "train" not in self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(
                f"splits={self.splits}: expected some of {', '.join(SPLITS)}, and train among them, which decides what "
                "the categories are"
            )


def build(folder: Path, wheels: dict[str, Path], settings: Settings, processes: int) -> dict[str, Any]:
    """Fills the folder; returns the numbers of pages and boxes of each split."""
    splits, limit = settings.splits, settings.limit
    for name in ("annotations", *splits):
        (folder / name).mkdir()
    with zipfile.ZipFile(wheels["music21"]) as corpus:
        jobs = list_jobs(corpus, splits, limit)
    with tempfile.TemporaryDirectory() as scratch:
        for project in ("verovio", "resvg-py"):
            with zipfile.ZipFile(wheels[project]) as archive:
                archive.extractall(scratch)
        spawn = multiprocessing.get_context("spawn")
        arguments = (wheels["music21"], Path(scratch), settings.paper, settings.long_side)
        with ProcessPoolExecutor(processes, spawn, _start_process, arguments) as pool:
            done = pool.map(partial(_save_pages, folder=folder), jobs)
            results = list(track(done, "engraving", len(jobs), console=Console(stderr=True)))
    pages: dict[str, list[tuple[dict[str, Any], list[Symbol]]]] = {split: [] for split in splits}
    for job, saved in zip(jobs, results, strict=True):
        pages[job.split] += saved
    if limit is not None:
        for split, entries in pages.items():
            for image, _ in entries[limit:]:
                (folder / split / image["file_name"]).unlink()
            del entries[limit:]
    return _write_annotations(folder, pages, limit)


def _write_annotations(
    folder: Path, pages: dict[str, list[tuple[dict[str, Any], list[Symbol]]]], limit: int | None
) -> dict[str, Any]:
    """Writes the COCO files. A category has MIN_TRAIN_BOXES in train; a limit lowers the number in proportion."""
    counts = Counter(symbol.name for _, symbols in pages["train"] for symbol in symbols)
    least = MIN_TRAIN_BOXES if limit is None else max(1, round(MIN_TRAIN_BOXES * limit / PAGES["train"]))
    ids = {name: number for number, name in enumerate(sorted(n for n in counts if counts[n] >= least), start=1)}
    summary: dict[str, Any] = {"categories": list(ids)}
    for split, entries in pages.items():
        annotations: list[dict[str, Any]] = []
        for image_id, (_, symbols) in enumerate(entries, start=1):
            for name, x0, y0, x1, y1 in symbols:
                if name not in ids or x1 - x0 < 1 or y1 - y0 < 1:
                    continue
                box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name], "bbox": box}
                annotations.append({**entry, "area": round(box[2] * box[3], 2), "iscrowd": 0})
        coco = {
            "images": [{"id": number, **image} for number, (image, _) in enumerate(entries, start=1)],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
        write_json(folder / "annotations" / f"{split}.json", coco)
        summary[split] = {"pages": len(entries), "boxes": len(annotations)}
    return summary


def prepare(root: Path, settings: Settings, *, processes: int = 2) -> tuple[dict[str, Any], bool]:
    """Makes the data set under `root` unless it is there; returns its summary and whether it was there already.

    `processes` engrave at the same time; the result is the same.

    Raises:
        PreparationError: no connection, or `root` holds files that no preparation made.
    """

    def make(folder: Path) -> dict[str, Any]:
        return build(folder, download_wheels(root.resolve() / "cache"), settings, processes)

    # As JSON reads it back: lists, no tuples.
    request = {"layout": LAYOUT, "wheels": sha256_of(REQUIREMENTS), **json.loads(json.dumps(asdict(settings)))}
    return prepare_folder(root, request, make)


def main() -> int:
    """Prepares the data as the command line says; returns the exit code."""
    usual = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--root", "--out", type=Path, default=Path("data/scores"), help="default: %(default)s")
    parser.add_argument(
        "--paper", type=int, nargs=2, default=usual.paper, metavar=("WIDTH", "HEIGHT"), help="mm, default: 160 220"
    )
    parser.add_argument("--long-side", type=int, default=usual.long_side, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="default: all")
    parser.add_argument("--limit", type=int, metavar="PAGES", help="of each split, default: all")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    try:
        settings = Settings(tuple(args.paper), args.long_side, tuple(args.splits), args.limit)
        summary, reused = prepare(args.root, settings, processes=args.processes)
    except (PreparationError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("split", "pages", "boxes", title=f"Scores in {args.root}" + (" (already complete)" if reused else ""))
    for split in settings.splits:
        table.add_row(split, str(summary[split]["pages"]), str(summary[split]["boxes"]))
    Console().print(table, f"{len(summary['categories'])} categories")
    return 0


if __name__ == "__main__":
    sys.exit(main())
