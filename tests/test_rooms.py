"""The house: imports run one way through the rooms of docs/architecture.md, and it stays small enough to read."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "__main__",
    "cli",
    "doctor",
    "report",
    "export",
    "runtime",
    "conversion",
    "engine",
    "models",
    "layers",
    "ops",
    "datasets",
    "registry",
    "config",
    "startup",
    "compat",
    "files",
)
"""Each room may import from those below it, also inside of functions."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("castling_det", exclude_type_checking_imports=True, cache_dir=None)


def room(module: str) -> str:
    return module.split(".")[1]


def imports_upwards(graph: grimp.ImportGraph, rooms: tuple[str, ...]) -> list[str]:
    rank = {name: place for place, name in enumerate(rooms)}
    return [
        f"{importer} imports {imported}"
        for importer in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer))
        if "." in importer and "." in imported and rank[room(importer)] > rank[room(imported)]
    ]


def test_every_module_has_a_room(graph: grimp.ImportGraph) -> None:
    assert {room(module) for module in graph.modules if "." in module} == set(ROOMS)


def test_imports_run_one_way(graph: grimp.ImportGraph) -> None:
    assert imports_upwards(graph, ROOMS) == []


def test_control_the_reversed_order_is_refused(graph: grimp.ImportGraph) -> None:
    assert len(imports_upwards(graph, ROOMS[::-1])) > 50


def lines_of(folder: str) -> dict[Path, int]:
    files = (path for path in ROOT.joinpath(folder).rglob("*.py") if ".mim" not in path.parts)
    return {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}


def test_the_house_does_not_grow() -> None:
    """Ceilings, to be lowered: the aim is 10,000 lines in 80 files, and 12,000 lines of tests."""
    package, tests = lines_of("castling_det"), lines_of("tests")
    assert sum(package.values()) <= 12_980 and len(package) <= 91
    assert sum(tests.values()) <= 16_600
    assert max(package.values()) <= 400
