"""Writes the tables of README.md and docs/ from the records under results/.

A table stands between `<!-- begin table NAME: COMMAND -->`, the command being this one, and `<!-- end table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
FRONTIER = RESULTS / "frontier" / "score_pages.json"
FRONTIER_CROWNS = RESULTS / "frontier" / "tree_crowns.json"
BLOCK = re.compile(r"(<!-- begin table (\w+):[^\n]*-->\n).*?(<!-- end table -->)", re.DOTALL)

sys.path.insert(0, str(ROOT))

from castling_det.files import write_text  # noqa: E402
from castling_det.report.records import Report, read_report, summaries  # noqa: E402
from castling_det.report.render import headline, markdown_table  # noqa: E402
from tests.robustness.records import read_trials, trials_markdown  # noqa: E402
from tools.benchmarks.attention import ratios_markdown, read_benchmark  # noqa: E402
from tools.benchmarks.frontier_record import (  # noqa: E402
    detectors_markdown,
    gains_markdown,
    read_record,
    sheets_markdown,
)
from tools.benchmarks.gpu import gpu_markdown, read_gpu  # noqa: E402
from tools.benchmarks.numerics import numerics_markdown, read_numerics  # noqa: E402
from tools.dev.model_zoo import read_zoo, zoo_markdown  # noqa: E402
from tools.dev.test_stack import STACKS  # noqa: E402


def stacks() -> str:
    """What the suite said on each stack, or that it has not been run there."""
    body = []
    for name, stack in STACKS.items():
        path = RESULTS / "stacks" / f"{name}.json"
        if not path.is_file():
            pins = [pin.replace("==", " ") for pin in stack.pins if pin.startswith(("torch==", "numpy==", "mm"))]
            shown = ", ".join(pins) or "requirements/default.txt"
            body.append([name, shown, "not recorded", "", "", f"`make test-stack STACK={name}`", ""])
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        versions = record["versions"].items()
        shown = ", ".join(f"{key} {value}" for key, value in versions if not key.startswith(("torchvision", "timm")))
        counts = [str(record[key]) for key in ("passed", "failed", "skipped")]
        body.append([name, shown, *counts, f"`{record['command']}`", record["commit"][:7]])
    return "\n".join(markdown_table(["stack", "versions", "passed", "failed", "skipped", "command", "commit"], body))


def stability() -> str:
    """Long trainings in half precision."""
    head = ("precision", "iterations", "batch", "not finite", "skipped", "gradient norm up to", "loss scale", "commit")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("stability/*.json"))]
    body = []
    for record in records:
        scales = record["traces"].get("loss_scale", {}).get("values", [])
        scale = f"{scales[0]:.0f} to {scales[-1]:.0f}" if scales else "none"
        counts = [str(record[key]) for key in ("iterations", "batch_size", "not_finite", "skipped_steps")]
        norm, commit = f"{record['max_grad_norm']:.1f}", (record["machine"]["commit"] or "-")[:7]
        body.append([record["precision"], *counts, norm, scale, commit])
    return "\n\n".join(["\n".join(markdown_table(head, body)), *(f"`{record['command']}`" for record in records)])


def loss_table(report: Report) -> str:
    """How low the training losses end: the mean over a name's seeds, and the difference from the baseline's.

    Runs of one seed see the same images in the same order, so that most of the noise of a loss is the same in both.
    """
    body = []
    for found in summaries(report):
        loss, gain = found.spreads["loss"], found.differences["loss"]
        difference = "baseline" if found.name == report.baseline else gain.text("+") if gain else "-"
        body.append([found.name, str(found.seeds), loss.text() if loss else "-", difference])
    return "\n".join(markdown_table(("run", "seeds", "loss", f"loss - {report.baseline}"), body)) + "\n"


def gpu() -> str:
    """What `make gpu-check` measured on each GPU."""
    records = [gpu_markdown(read_gpu(path)) for path in sorted(RESULTS.glob("gpu/*.json"))]
    return "\n".join(records) or "Not measured: no GPU was at hand."


def table(name: str) -> str:
    """The table of a name: a report's runs or losses, or one of `TABLES`; KeyError for any other."""
    folder = {"uptraining": "tree_crowns_uptraining"}.get(name, name).removesuffix("_losses")
    report = RESULTS / folder / "report.json"
    if report.is_file():
        return (loss_table if name.endswith("_losses") else headline)(read_report(report))
    return TABLES[name]()


TABLES: dict[str, Callable[[], str]] = {
    "attention_ratios": lambda: ratios_markdown(
        [read_benchmark(path) for path in sorted(RESULTS.glob("attention/*/benchmark.json"))]
    ),
    "attention_numerics": lambda: numerics_markdown(read_numerics(RESULTS / "attention" / "numerics.json")),
    "crashes": lambda: trials_markdown(read_trials(RESULTS / "robustness" / "crashes.json")),
    "deployed_latency": lambda: "\n".join(p.read_text() for p in sorted(RESULTS.glob("*/*/latency.md"))),
    "exports": lambda: "\n".join(p.read_text() for p in sorted(RESULTS.glob("*/*/accuracy.md"))),
    "fuzz": lambda: trials_markdown(read_trials(RESULTS / "robustness" / "fuzz.json")),
    "frontier_detectors": lambda: detectors_markdown(read_record(FRONTIER)),
    "frontier_gains": lambda: gains_markdown(read_record(FRONTIER)),
    "frontier_crowns_detectors": lambda: detectors_markdown(read_record(FRONTIER_CROWNS)),
    "frontier_crowns_gains": lambda: gains_markdown(read_record(FRONTIER_CROWNS)),
    "frontier_sheets": lambda: sheets_markdown(read_record(FRONTIER)),
    "gpu": gpu,
    "model_zoo": lambda: zoo_markdown(read_zoo(RESULTS / "model_zoo.json")),
    "stability": stability,
    "stacks": stacks,
}


def main() -> int:
    """Rewrites the documents, or with --check only says which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        try:
            new = BLOCK.sub(lambda found: f"{found[1]}{table(found[2]).strip()}\n{found[3]}", text)
        except KeyError as error:
            print(f"{path}: table {error}: no record belongs to it", file=sys.stderr)
            return 1
        if text != new:
            stale.append(path)
            print(f"{path.relative_to(ROOT)}: a table {'is out of date' if check else 'was written'}", file=sys.stderr)
            if not check:
                write_text(path, new)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
