"""Every test that docs/robustness.md names exists, and so does every case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^Tests: `([\w/.]+\.py)(?:::(\w+))?`(, by case)?$")
CELL = re.compile(r"\| `([^`]+)` \|$")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def strings(path: Path) -> set[str]:
    return {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}


def missing(text: str) -> list[str]:
    """Tests and cases in the document's tables that are not in the files."""
    found: list[str] = []
    path, by_case, rows = ROOT, False, 0
    for line in text.splitlines():
        if section := SECTION.match(line):
            path, by_case = ROOT / section[1], bool(section[3])
            if section[2] and section[2] not in functions(path):
                found.append(section[2])
        elif path != ROOT and (cell := CELL.search(line)):
            rows += 1
            if cell[1] not in (strings(path) if by_case else functions(path)):
                found.append(cell[1])
    assert rows > 50
    return found


def test_every_row_names_a_test_that_exists() -> None:
    assert missing((ROOT / "docs" / "robustness.md").read_text()) == []


@pytest.mark.parametrize("name", ["a tensor without values", "test_no_way_of_calling_is_followed"])
def test_control_another_name_is_noticed(name: str) -> None:
    text = (ROOT / "docs" / "robustness.md").read_text()
    assert missing(text.replace(f"`{name}`", f"`{name} too`")) == [f"{name} too"]
