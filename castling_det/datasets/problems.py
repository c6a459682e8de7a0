"""One thing that is wrong with the data or its config, and how many of them become one error."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Problem", "Severity", "examples", "raise_for_problems"]

Severity = Literal["error", "warning"]


# What a file holds may be nested, or megabytes long.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


@dataclass(frozen=True)
class Problem:
    """`field` is the config field or the place in the annotation file; `fix` is what to do about it.

    An "error" would stop training or silently spoil it; a "warning" is something the loader leaves out or
    clips.
    """

    severity: Severity
    field: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.field}: {self.message}\n    fix: {self.fix}"


def examples(values: Sequence[object], limit: int = 5) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(_SHORT.repr(value) for value in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def raise_for_problems(problems: Iterable[Problem], *, source: str = "the annotations") -> None:
    """Raises one ValueError that lists every error in `problems`; warnings alone raise nothing."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ValueError(f"{source}: {count} to solve first.\n" + "\n".join(f"  {error}" for error in errors))
