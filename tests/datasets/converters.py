"""The scripts under tools/dataset_converters/ as modules: like MMDetection's tools they are no package."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "tools" / "dataset_converters"
sys.path.insert(0, str(FOLDER))

import common  # noqa: E402  # the folder must be on the path first
import engraving  # noqa: E402
import scores  # noqa: E402
import tree_crowns  # noqa: E402

__all__ = ["FOLDER", "common", "engraving", "scores", "tree_crowns"]
