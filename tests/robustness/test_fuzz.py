"""A few thousand seeded cases of the fuzz; `make fuzz` runs a hundred thousand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.robustness.fuzz import Reader, fuzz, mutated, readers
from tests.robustness.mutations import mutated_bytes

CASES = 400
NAMES = (
    "checkpoint", "checkpoint, old format", "safetensors", "annotations", "annotations of a report", "results",
    "ONNX metadata", "image", "folder",
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Reader]:
    return readers()


def test_every_reader_is_tested(found: dict[str, Reader]) -> None:
    assert tuple(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_read_or_refused_by_name(found: dict[str, Reader], tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    target = fuzz(name, found[name], seed=0, cases=CASES, folder=tmp_path)
    assert target.failures == ()
    cases, valid, refused = target.counts.values()
    assert cases == valid + refused == CASES and min(valid, refused) > CASES / 50


def test_the_valid_files_are_read(found: dict[str, Reader], tmp_path: Path) -> None:
    for name, reader in found.items():
        for content in reader.files:
            path = tmp_path / f"whole{reader.suffix}"
            path.write_bytes(content)
            if b"acTL" in content:  # an animation, of which OpenCV crashed
                with pytest.raises(ValueError, match="an animation"):
                    reader.read(path)
            elif name not in ("annotations", "folder"):  # without images
                reader.read(path)


def test_cases_are_the_same_again(found: dict[str, Reader]) -> None:
    reader = found["checkpoint"]
    assert mutated(reader, "checkpoint", 0, 5) == mutated(reader, "checkpoint", 0, 5)
    assert mutated(reader, "checkpoint", 0, 5) != mutated(reader, "checkpoint", 1, 5)
    before, again = ([mutated(found["annotations"], "annotations", 0, n) for n in range(50)] for _ in "ab")
    assert before == again and sum(case != found["annotations"].files[0] for case in before) > 40


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (partial(_raise, KeyError("x")), "KeyError"),
        (partial(_raise, RecursionError("deep")), "RecursionError"),
        (partial(_raise, MemoryError()), "MemoryError"),
        (partial(_raise, ValueError("damaged")), "without the file's name"),
        (partial(_raise, SystemExit(0)), "SystemExit"),
        (lambda: np.ones(50_000_000).sum(), "MB"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "ended the process (-11)"),
    ],
    ids=["key", "depth", "memory", "value", "exit", "megabytes", "crash"],
)
def test_control_other_outcomes_are_failures(tmp_path: Path, act: Callable[[], Any], outcome: str) -> None:
    reader = Reader(".x", (b"abc",), (mutated_bytes,), lambda path: act())
    target = fuzz("x", reader, seed=0, cases=2, folder=tmp_path, isolated=True)
    assert len(target.failures) == (1 if outcome == "MB" else 2) and outcome in target.failures[0]


def test_control_a_case_may_not_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.robustness.fuzz.SECONDS_A_CASE", 0.05)
    reader = Reader(".x", (b"abc",), (mutated_bytes,), lambda path: sum(range(10**8)) and None)
    (failure,) = fuzz("x", reader, seed=0, cases=1, folder=tmp_path).failures
    assert "seconds" in failure
