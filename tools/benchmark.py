"""Times the attentions: the command of tools/benchmarks/attention.py, whose --help says more. Needs a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if not Path(__file__).with_name("benchmarks").is_dir():  # as in an installed wheel
        sys.exit("error: tools/benchmarks/ is not here; run tools/benchmark.py from a checkout of castling_det")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tools.benchmarks.attention import main

    sys.exit(main())
