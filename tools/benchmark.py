"""Latency and peak memory of core, block, backbone and detector: fused softmax, hybrid, linear, published formulation.

Writes benchmark.json, benchmark.md and benchmark.png into --out and prints the Markdown. Outputs and gradients of
every variant are compared with float64 before it is timed; where they are off, times are shown and ratios are not.
Exit code: 0; 1 if a row failed, a parity is red or an argument is wrong.

  tools/benchmark.py --levels core block --sizes 16 32 64 --dtypes float32 --threads 2 --out work_dirs/benchmark
  tools/benchmark.py --render work_dirs/benchmark/benchmark.json
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from castling_det.analysis.benchmark import (
    DTYPES,
    LEVELS,
    PASSES,
    VARIANTS,
    BenchmarkOptions,
    BenchmarkReport,
    benchmark_markdown,
    parse_size,
    read_benchmark,
    render_benchmark,
    run_benchmark,
    write_benchmark,
)

DEFAULTS = dataclasses.asdict(BenchmarkOptions())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"levels": LEVELS, "variants": tuple(VARIANTS), "passes": PASSES, "dtypes": DTYPES}
    for name, choices in words.items():
        default = " ".join(DEFAULTS[name])
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"of {', '.join(choices)} ({default})")
    for flag, text in (("sizes", "token maps of core and block"), ("image-sizes", "images of backbone and detector")):
        default = " ".join(str(height) for height, _ in DEFAULTS[flag.replace("-", "_")])
        parser.add_argument(f"--{flag}", nargs="+", metavar="SIDE|HxW", help=f"{text} ({default})")
    for name in ("batch", "repeats", "warmup", "embed_dims", "num_heads", "depth"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help=f"default: {DEFAULTS[name]}")
    parser.add_argument("--max-seconds", type=float, metavar="S", help=f"of a case ({DEFAULTS['max_seconds']})")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="also the linear variant through torch.compile")
    parser.add_argument("--config-prefix", metavar="PATH", help="detector: PREFIX_{softmax,castling,linear}SUFFIX")
    parser.add_argument("--config-suffix", metavar="TEXT", help=f"default: {DEFAULTS['config_suffix']}")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder to write into")
    where.add_argument("--render", type=Path, metavar="FILE", help="a benchmark.json: render it again beside itself")
    return parser.parse_args()


def options_from(arguments: argparse.Namespace) -> BenchmarkOptions:
    """Every option that was given; the others are the package's defaults."""
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS and value is not None}
    for name in ("sizes", "image_sizes"):
        if name in given:
            option = f"--{name.replace('_', '-')}"
            given[name] = tuple(parse_size(option, text) for text in given[name])
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if arguments.compile:
        given["variants"] = tuple(dict.fromkeys((*given.get("variants", DEFAULTS["variants"]), "linear_compiled")))
    return BenchmarkOptions(**given)


def measure(arguments: argparse.Namespace) -> BenchmarkReport:
    """Runs the benchmark under a progress bar."""
    options = options_from(arguments)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads {arguments.threads}: expected at least 1")
        torch.set_num_threads(arguments.threads)
    command = shlex.join(["tools/benchmark.py", *sys.argv[1:]])
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("benchmark", total=None)
        return run_benchmark(
            options,
            created_by=command,
            progress=lambda done, total, text: bar.update(task, completed=done, total=total, description=text),
        )


def main() -> int:
    """Returns the exit code."""
    arguments = parse_arguments()
    try:
        if arguments.render:
            report = read_benchmark(arguments.render)
            render_benchmark(arguments.render.parent, report)
        else:
            # Before hours of measuring, so that a folder that cannot be written is known at once.
            arguments.out.mkdir(parents=True, exist_ok=True)
            report = measure(arguments)
            write_benchmark(arguments.out, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(benchmark_markdown(report))
    return 0 if report.green else 1


if __name__ == "__main__":
    sys.exit(main())
