"""For every test: no compiled kernel that the user built; what a stack cannot do, as it says, is a skip, no failure."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from castling_det.compat.host import EXPORTING_TORCH, release
from tests.stacks import TORCH

WALLS = {
    (2, 6): "cannot read checkpoints safely; install torch",
    release(EXPORTING_TORCH): "cannot export detectors; install torch",
}
"""What torch cannot do before a version, in the words of our errors, which are not those of the notice at import."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skips on an old torch what fails for what it cannot do, in this process or in a command of the test."""
    report = yield
    said = "\n".join([report.longreprtext, *(text for _, text in report.sections)])
    for version, wall in WALLS.items():
        if version > TORCH and report.failed and wall in said:
            report.outcome = "skipped"
            reason = f"Skipped: torch {torch.__version__} {wall}"
            report.longrepr = (str(item.path), item.location[1] or 0, reason)
    return report
