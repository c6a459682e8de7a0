"""The scripts of the experiments are no package, like MMDetection's tools: their folder goes on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
