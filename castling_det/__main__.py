"""`python -m castling_det` is `castling-det`."""

import sys

from castling_det.cli import main

sys.exit(main())
