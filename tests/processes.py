"""Processes for tests that kill, or train in ranks.

Not forks of pytest's own process, which has threads: a fork can wait for them forever. All are forked from one server,
which imports MMDetection once; each has random generators of its own: seed them.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

__all__ = ["process_context"]


def process_context() -> ForkServerContext:
    """What has `Process`; targets and arguments are pickled."""
    context = multiprocessing.get_context("forkserver")
    # Test modules are left out: the server is started once, by whichever test comes first.
    context.set_forkserver_preload(["mmdet.models", "mmengine.runner", "castling_det.models"])
    return context
