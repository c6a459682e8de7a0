"""A few thousand seeded cases of the fuzz; `make fuzz` runs a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.samples import MACHINE
from tests.robustness.fuzz import Reader, fuzz, mutated, readers
from tests.robustness.mutations import mutated_bytes
from tests.robustness.records import FuzzReport, fuzz_markdown, read_fuzz, write_fuzz

CASES = 800


@pytest.fixture(scope="module")
def found() -> dict[str, Reader]:
    return readers()


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint, old format", "safetensors", "annotations"])
def test_mutations_are_read_or_refused_by_name(found: dict[str, Reader], tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    target = fuzz(name, found[name], seed=0, cases=CASES, folder=tmp_path)
    assert target.failures == ()
    assert target.read + target.refused == CASES and target.refused > CASES / 4 and target.read > CASES / 50


def test_the_valid_files_are_read(found: dict[str, Reader], tmp_path: Path) -> None:
    for reader in found.values():
        for content in reader.files:
            path = tmp_path / f"whole{reader.suffix}"
            path.write_bytes(content)
            if reader.suffix != ".json":  # its images do not exist
                reader.read(path)


def test_cases_are_the_same_again(found: dict[str, Reader]) -> None:
    reader = found["checkpoint"]
    assert mutated(reader, "checkpoint", 0, 5) == mutated(reader, "checkpoint", 0, 5)
    assert mutated(reader, "checkpoint", 0, 5) != mutated(reader, "checkpoint", 1, 5)
    before, again = ([mutated(found["annotations"], "annotations", 0, n) for n in range(50)] for _ in "ab")
    assert before == again and sum(case != found["annotations"].files[0] for case in before) > 40


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyError("x"), "KeyError"),
        (RecursionError("deep"), "RecursionError"),
        (MemoryError(), "MemoryError"),
        (ValueError("damaged"), "without the file's name"),
        (SystemExit(0), "SystemExit"),
    ],
)
def test_control_other_outcomes_are_failures(tmp_path: Path, error: BaseException, outcome: str) -> None:
    def read(path: Path) -> None:
        raise error

    target = fuzz("x", Reader(".x", (b"abc",), (mutated_bytes,), read), seed=0, cases=3, folder=tmp_path)
    assert len(target.failures) == 3 and outcome in target.failures[0]


def test_the_record_comes_back_and_is_tabulated(found: dict[str, Reader], tmp_path: Path) -> None:
    target = fuzz("safetensors", found["safetensors"], seed=0, cases=20, folder=tmp_path)
    report = FuzzReport("python -m tests.robustness.fuzz", 0, 1.5, MACHINE, (target,))
    write_fuzz(tmp_path / "fuzz.json", report)
    assert read_fuzz(tmp_path / "fuzz.json") == report
    assert "| all " in fuzz_markdown(report) and "anything else" in fuzz_markdown(report)
