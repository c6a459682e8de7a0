"""Times the attentions: the command of tools/benchmarks/attention.py, whose --help says more."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.benchmarks.attention import main

if __name__ == "__main__":
    sys.exit(main())
