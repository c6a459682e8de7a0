"""Prints parameters and multiply-adds (MACs) of a config's detector. Needs no data and no weights."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter

from mmengine.config import DictAction

from castling_det.config import input_size_of, load_config
from castling_det.files import write_json
from castling_det.report.complexity import Complexity, detector_complexity


def macs_by_part(found: Complexity) -> dict[str, int]:
    """Multiply-adds by the first component of the modules' names, such as `backbone`."""
    parts: Counter[str] = Counter()
    for name, kinds in found.modules.items():
        parts[name.split(".")[0]] += sum(kinds.values())
    return dict(parts)


def table(found: Complexity, *, by_module: bool) -> str:
    """Parameters and GMACs by part and by kind, and by module if asked, as aligned text."""
    sections = {"by part": macs_by_part(found), "by kind": found.macs_by_kind}
    if by_module:
        sections["by module"] = {name: sum(kinds.values()) for name, kinds in found.modules.items()}
    sections["by part"] = dict.fromkeys(found.params_by_part, 0) | sections["by part"]
    rows = []
    for title, section in sections.items():
        params = found.params_by_part if title == "by part" else {}
        rows.append((title, "params" if params else "", "gmacs", "share"))
        for name, macs in sorted(section.items(), key=lambda item: -item[1] if title == "by kind" else 0):
            count = f"{params[name]:,}" if name in params else ""
            rows.append((name, count, f"{macs / 1e9:,.4f}", f"{macs / (found.macs or 1):.1%}"))
        rows.append(("", "", "", ""))
    rows.append(("total", f"{found.params:,}", f"{found.gmacs:,.4f}", "100.0%"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    size, padded = (" x ".join(map(str, shape)) for shape in (found.input_shape, found.padded_shape))
    head = f"{found.config}: one image of {size} pixels (height x width)"
    head += f" padded to {padded}" if padded != size else ""
    missing = [f"not counted: {operator}" for operator in found.uncounted]
    return "\n".join([head, "gmacs: 10^9 multiply-adds", "", *lines, *missing])


def main() -> int:
    """Returns the exit code: 0, or 1 after an error on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file, or a package's own: mmdet::gfl/gfl_r50_fpn_1x_coco.py")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the image in pixels (default: what the test pipeline resizes to)",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the record, with a row a module, as JSON")
    parser.add_argument("--modules", action="store_true", help="print a row for each module")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that override the config's",
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.cfg_options)
        shape = arguments.shape or input_size_of(config)
        if shape is None:
            raise ValueError(f"config {arguments.config}: its test pipeline states no size; give --shape H W")
        found = detector_complexity(config, tuple(shape), name=arguments.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(found, by_module=arguments.modules))
    if arguments.json:
        totals = {name: getattr(found, name) for name in ("macs", "gmacs", "macs_by_kind")}
        write_json(arguments.json, totals | {"macs_by_part": macs_by_part(found)} | dataclasses.asdict(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
