"""A table of GitHub's Markdown whose source reads as a table too."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "one_line"]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, columns padded to one width, the first to the left and the others to the right."""
    cells = [[one_line(cell) for cell in row] for row in (head, *body)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    top, *rest = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return ["| " + " | ".join(row) + " |" for row in (top, rule, *rest)]


def one_line(text: str) -> str:
    """The text as one line that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")
