"""For every test: files that need a newer torch than the installed one are skipped, by version."""

from __future__ import annotations

import pytest

from castling_det.compat.host import EXPORTING_TORCH, release
from tests.stacks import TORCH, needs_torch

EXPORTING = ("tests/export/", "tests/runtime/test_backends_agree.py")
"""Tests that write ONNX files, by the beginning of their names."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = release(EXPORTING_TORCH)
    mark = needs_torch(*needed, why=f"exporting detectors needs torch {EXPORTING_TORCH}")
    for item in items:
        if needed > TORCH and item.nodeid.startswith(EXPORTING):
            item.add_marker(mark)
