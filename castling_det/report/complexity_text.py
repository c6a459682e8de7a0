"""A complexity record as a table to read and as a JSON file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from castling_det.report.complexity import SCHEMA, Complexity
from castling_det.report.records import read_document, write_document

__all__ = ["complexity_table", "read_complexity", "write_complexity"]


def complexity_table(complexity: Complexity, *, by_module: bool = False) -> str:
    """Parameters and GMACs by part and by kind, and by module if asked, as aligned text."""
    rows: list[Sequence[str]] = [("by part", "params", "gmacs", "share")]
    for part in {**complexity.params_by_part, **complexity.macs_by_part}:
        macs = complexity.macs_by_part.get(part, 0)
        rows.append((part, f"{complexity.params_by_part.get(part, 0):,}", *_macs(macs, complexity.macs)))
    rows += [("", "", "", ""), ("by kind", "", "gmacs", "share")]
    ordered = sorted(complexity.macs_by_kind.items(), key=lambda item: -item[1])
    rows += [(kind, "", *_macs(macs, complexity.macs)) for kind, macs in ordered]
    if by_module:
        rows += [("", "", "", ""), ("by module", "params", "gmacs", "share")]
        for module in complexity.modules:
            macs = sum(module.macs.values())
            rows.append((f"{module.name} ({module.type})", f"{module.params:,}", *_macs(macs, complexity.macs)))
    rows += [("", "", "", ""), ("total", f"{complexity.params:,}", *_macs(complexity.macs, complexity.macs))]
    height, width = complexity.input_shape
    padded = (
        ""
        if complexity.padded_shape == complexity.input_shape
        else " padded to {} x {}".format(*complexity.padded_shape)
    )
    head = f"{complexity.config}: one image of {height} x {width} pixels (height x width){padded}"
    return "\n".join([head, "gmacs: 10^9 multiply-adds, in closed form", "", *_aligned(rows)])


def write_complexity(path: str | os.PathLike[str], complexity: Complexity) -> None:
    """Writes the record as JSON."""
    write_document(path, complexity, schema=SCHEMA, field="complexity")


def read_complexity(path: str | os.PathLike[str]) -> Complexity:
    """Reads what `write_complexity` wrote.

    Raises:
        ValueError: not such a file; names it and the fix.
    """
    fix = "make it again with tools/complexity.py CONFIG --shape H W --json OUT"
    return read_document(path, Complexity, schema=SCHEMA, field="complexity", fix=fix)


def _macs(macs: int, total: int) -> tuple[str, str]:
    return f"{macs / 1e9:,.4f}", f"{macs / total:.1%}" if total else "-"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]
