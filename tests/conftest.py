"""For every test: what a stack cannot do, as the package itself says, is a skip and not a failure."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

NO_SAFE_READING = "cannot read checkpoints safely; install torch >= 2.6"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skips on torch < 2.6 what fails for reading a checkpoint there, in this process or in a command of the test."""
    report = yield
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6)
    said = "\n".join([report.longreprtext, *(text for _, text in report.sections)])
    if old and report.failed and NO_SAFE_READING in said:
        report.outcome = "skipped"
        reason = f"Skipped: torch {torch.__version__} {NO_SAFE_READING}"
        report.longrepr = (str(item.path), item.location[1] or 0, reason)
    return report
