"""Compares trained detectors: reads what they left, writes report.json, report.md and index.html. Measures nothing.

A run is NAME=PATH: the work dir of MMDetection's tools/train.py or tools/test.py, a checkpoint (its folder counts), or
a COCO results file (FILE.json, evaluated here). More fields follow after commas where a default does not fit:

  test=DIR          work dir of tools/test.py (default PATH/test, or PATH where the test wrote there)
  train=DIR         work dir of the training (default PATH; for a converted checkpoint, that of its source)
  config=FILE       config (default: what the tools dumped)
  checkpoint=FILE   tested checkpoint (default: what the test's config says, else the last one)
  predictions=FILE  COCO results (default: predictions.bbox.json in the test's work dir)
  seed=N            (default: from a folder such as seed0 in the path, else from the config)

Runs of the same name are seeds of one another and share a row. A run that was not tested has the figures of its last
validation, and says so. Differences from the baseline get an interval, by a bootstrap over the test images, where
predictions of both are at hand. Latency and memory are read from --latency.
Exit code: 0; 1 if a run failed; 2 for a wrong argument or a file that cannot be read or written.

  tools/report.py --run softmax=work_dirs/demo/seed0/softmax --run castling=work_dirs/demo/seed0/castling
      --run deploy=work_dirs/demo/seed0/deploy --baseline softmax --deployed deploy
      --ann data/tree_crowns/annotations/val.json --images data/tree_crowns/val --out work_dirs/demo/report
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from castling_det.files import atomic_write
from castling_det.report.attention_maps import AttentionPicture, read_picture
from castling_det.report.build import build_report, comparison_pictures
from castling_det.report.evaluation import Annotations
from castling_det.report.figures import Row
from castling_det.report.records import Latency, read_json
from castling_det.report.render import markdown, write_report
from castling_det.report.runs import RunSpec, classes_of


def read_latency(path: Path) -> dict[str, Latency]:
    """Latencies by name of the run, from `{"latency": {NAME: {p50_ms, ...}}}`; ValueError names file and field."""
    form = '{"latency": {NAME: {"p50_ms": ..., "threads": ..., "device": ..., "input_shape": [H, W]}}}'
    rows = read_json(path, dict[str, dict[str, Latency]], form).get("latency")
    if rows is None:
        raise ValueError(f"{path}: expected {form}")
    return {name: replace(row, source=str(path)) for name, row in rows.items()}


def read_pictures(path: Path) -> list[AttentionPicture]:
    """The picture in a PNG of tools/attention.py, or those of all PNGs in a folder, by name; else ValueError."""
    files = sorted(path.glob("*.png")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise ValueError(f"--attention {path}: no such file, or no .png in the folder; tools/attention.py writes them")
    return [read_picture(file) for file in files]


def strip(row: Row, titles: tuple[str, str, str]) -> Image.Image:
    """The three pictures of a row of the gallery beside each other, each under its title."""
    width, height = row.truth.size
    head, gap = 24, 8
    whole = Image.new("RGB", (3 * width + 2 * gap, height + head), "white")
    for number, (picture, title) in enumerate(zip((row.truth, row.baseline, row.deployed), titles, strict=True)):
        left = number * (width + gap)
        ImageDraw.Draw(whole).text((left + 4, 4), title, fill="black", font_size=14)
        whole.paste(picture, (left, head))
    return whole


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=PATH[,KEY=VALUE...]", dest="runs")
    parser.add_argument("--baseline", required=True, metavar="NAME", help="the run that the others are compared with")
    parser.add_argument("--deployed", metavar="NAME", help="the run that is shipped (default: that of the last --run)")
    parser.add_argument("--ann", required=True, type=Path, metavar="FILE", help="COCO annotations that were tested on")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the tested images")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("H", "W"), help="image for GMACs (default: as tested)")
    parser.add_argument("--latency", type=Path, metavar="FILE", help="JSON with measured latencies by run")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="draws of the images; 0: no interval")
    parser.add_argument("--bootstrap-seed", type=int, default=0, metavar="N", help="of these draws")
    parser.add_argument("--dataset", metavar="TEXT", help="what the report calls the data (default: file and counts)")
    parser.add_argument("--score", type=float, default=0.3, help="score from which on a box counts in the pictures")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="images in the gallery")
    text = "a PNG of tools/attention.py, or a folder of them"
    parser.add_argument("--attention", type=Path, metavar="DIR-OR-PNG", help=text)
    parser.add_argument("--strip", type=Path, metavar="FILE.png", help="the gallery's first row as a picture too")
    arguments = parser.parse_args()
    try:
        specs = [RunSpec.parse(text) for text in arguments.runs]
        annotations = Annotations(arguments.ann, description=arguments.dataset, classes=classes_of(specs))
        report = build_report(
            specs,
            baseline=arguments.baseline,
            deployed=arguments.deployed or specs[-1].name,
            annotations=annotations,
            created_by=shlex.join(["tools/report.py", *sys.argv[1:]]),
            shape=tuple(arguments.shape) if arguments.shape else None,
            latency=read_latency(arguments.latency) if arguments.latency else None,
            score_threshold=arguments.score,
            resamples=arguments.resamples,
            bootstrap_seed=arguments.bootstrap_seed,
        )
        pictures = comparison_pictures(report, annotations, arguments.images, count=arguments.pictures)
        attention = read_pictures(arguments.attention) if arguments.attention else ()
        write_report(arguments.out, report, pictures, attention)
        if arguments.strip and pictures:
            titles = ("ground truth", f"{report.baseline} (baseline)", f"{report.deployed} (linear attention only)")
            with atomic_write(arguments.strip) as temporary:
                strip(pictures[0], titles).save(temporary, format="PNG", optimize=True)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(markdown(report))
    print(f"{arguments.out / 'index.html'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
