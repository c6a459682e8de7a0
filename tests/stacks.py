"""What the versions under test can do; nothing here is a test."""

from __future__ import annotations

import pytest
import torch

from castling_det.compat.host import release

__all__ = ["TORCH", "needs_torch"]

TORCH = release(torch.__version__)


def needs_torch(*version: int, why: str) -> pytest.MarkDecorator:
    """Skips a test on an older torch."""
    return pytest.mark.skipif(version > TORCH, reason=f"torch {torch.__version__}: {why}")
