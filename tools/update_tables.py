"""Writes the tables of README.md and docs/ from the records under results/.

A table stands between `<!-- begin table NAME: python tools/update_tables.py -->` and `<!-- end table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
BLOCK = re.compile(r"(<!-- begin table (\w+): python tools/update_tables\.py -->\n).*?(<!-- end table -->)", re.DOTALL)


def runs(folder: str) -> str:
    """Runs of a report, with the machine line."""
    from castling_det.report import headline
    from castling_det.report.record import read_report

    return headline(read_report(RESULTS / folder / "report.json"))


def losses(folder: str) -> str:
    """How low the training losses of a report's runs end."""
    from castling_det.report import loss_table
    from castling_det.report.record import read_report

    return loss_table(read_report(RESULTS / folder / "report.json"))


def attention_ratios() -> str:
    """Ratios of the benchmarks, with the machine line."""
    from tools.benchmarks.attention import ratios_markdown, read_benchmark

    return ratios_markdown([read_benchmark(path) for path in sorted(RESULTS.glob("attention/*/benchmark.json"))])


def attention_numerics() -> str:
    """Errors against float64."""
    from tools.benchmarks.numerics import numerics_markdown, read_numerics

    return numerics_markdown(read_numerics(RESULTS / "attention" / "numerics.json"))


def model_zoo() -> str:
    """Parameters and GMACs of the COCO models."""
    from tools.dev.model_zoo import read_zoo, zoo_markdown

    return zoo_markdown(read_zoo(RESULTS / "model_zoo.json"))


def stacks() -> str:
    """What the suite said on each stack, or that it has not been run there."""
    from castling_det.report.markdown_table import markdown_table
    from tools.dev.test_stack import STACKS

    body = []
    for name, stack in STACKS.items():
        path = RESULTS / "stacks" / f"{name}.json"
        command = f"`make test-stack STACK={name}`"
        if not path.is_file():
            pins = [pin.replace("==", " ") for pin in stack.pins if pin.startswith(("torch==", "numpy==", "mm"))]
            body.append([name, ", ".join(pins) or "requirements/default.txt", "not recorded", "", "", command, ""])
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["versions"]
        shown = [f"{key} {found[key]}" for key in found if not key.startswith(("torchvision", "timm"))]
        counts = [str(record[key]) for key in ("passed", "failed", "skipped")]
        body.append([name, ", ".join(shown), *counts, f"`{record['command']}`", record["commit"][:7]])
    return "\n".join(markdown_table(["stack", "versions", "passed", "failed", "skipped", "command", "commit"], body))


def fuzz() -> str:
    """Cases of the fuzz."""
    from tests.robustness.records import fuzz_markdown, read_fuzz

    return fuzz_markdown(read_fuzz(RESULTS / "robustness" / "fuzz.json"))


def crashes() -> str:
    """Kills of our commands."""
    from tests.robustness.records import crash_markdown, read_crashes

    return crash_markdown(read_crashes(RESULTS / "robustness" / "crashes.json"))


def stability() -> str:
    """Long trainings in half precision."""
    from castling_det.report.markdown_table import markdown_table

    head = ("precision", "iterations", "batch", "not finite", "skipped", "gradient norm up to", "loss scale", "commit")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("stability/*.json"))]
    body = []
    for record in records:
        scales = record["traces"].get("loss_scale", {}).get("values", [])
        scale = f"{scales[0]:.0f} to {scales[-1]:.0f}" if scales else "none"
        counts = [str(record[key]) for key in ("iterations", "batch_size", "not_finite", "skipped_steps")]
        norm = f"{record['max_grad_norm']:.1f}"
        body.append([record["precision"], *counts, norm, scale, (record["machine"]["commit"] or "-")[:7]])
    commands = [f"`{record['command']}`" for record in records]
    return "\n\n".join(["\n".join(markdown_table(head, body)), *commands])


def exports() -> str:
    """mAP of exported files."""
    from castling_det.export.evaluation import read_accuracy

    return "\n".join(read_accuracy(path).markdown() for path in sorted(RESULTS.glob("deployment/*/accuracy.json")))


def deployed_latency() -> str:
    """Latency of exported detectors."""
    from castling_det.export.latency import read_latency

    return "\n".join(read_latency(path).markdown() for path in sorted(RESULTS.glob("deployment/*/latency.json")))


TABLES: dict[str, Callable[[], str]] = {
    "stacks": stacks,
    "tree_crowns": partial(runs, "tree_crowns"),
    "tree_crowns_losses": partial(losses, "tree_crowns"),
    "tree_crowns_ramp": partial(runs, "tree_crowns_ramp"),
    "tree_crowns_ramp_losses": partial(losses, "tree_crowns_ramp"),
    "tree_crowns_variants": partial(runs, "tree_crowns_variants"),
    "tree_crowns_options": partial(runs, "tree_crowns_options"),
    "tree_crowns_options_losses": partial(losses, "tree_crowns_options"),
    "uptraining": partial(runs, "tree_crowns_uptraining"),
    "attention_ratios": attention_ratios,
    "attention_numerics": attention_numerics,
    "model_zoo": model_zoo,
    "fuzz": fuzz,
    "crashes": crashes,
    "stability": stability,
    "exports": exports,
    "deployed_latency": deployed_latency,
}


def updated(path: Path, text: str) -> str:
    """The document with its tables made anew.

    Raises:
        ValueError: a table that no record belongs to.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"{path}: table {found[2]!r}: expected one of {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]]().strip()}\n{found[3]}"

    return BLOCK.sub(table, text)


def main() -> int:
    """Rewrites the documents, or with --check only says which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    args = parser.parse_args()
    from castling_det.files import write_text

    stale = False
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = updated(path, text)
        if text == new:
            continue
        stale = True
        if args.check:
            print(f"{path.relative_to(ROOT)}: a table is out of date", file=sys.stderr)
        else:
            write_text(path, new)
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
