"""Mask schedules: pure functions of training progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["SCHEDULES", "MaskState", "mask_state"]


class MaskState(NamedTuple):
    """What a layer's mask is set to."""

    threshold: float
    """In the layer's unit; inf once the mask is to be empty."""
    aux_scale: float
    """Factor on the softmax branch, >= 0; above 1 only by `share`."""


def _constant(ramp: float, start: float, end: float) -> float:
    return start


def _linear(ramp: float, start: float, end: float) -> float:
    return start + ramp * (end - start)


def _cosine(ramp: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * ramp)) / 2


def _geometric(ramp: float, start: float, end: float) -> float:
    return math.exp((1 - ramp) * math.log(start) + ramp * math.log(end))


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "geometric": _geometric,
}
"""Name to f(ramp, start, end), with ramp in [0, 1]; f(0) is `start`, and f(1) is `end` except for "constant"."""


def mask_state(
    progress: float,
    *,
    schedule: str,
    start: float,
    end: float,
    begin: float = 0.0,
    empty_from: float = 0.8,
    fade: bool = False,
    share: float | None = None,
) -> MaskState:
    """The mask at a point of training.

    Args:
        progress: iterations done over all iterations, in [0, 1].
        schedule: a key of `SCHEDULES`.
        start: threshold up to `begin`, in the layer's unit.
        end: threshold that the ramp reaches at `empty_from`, in the layer's unit.
        begin: progress at which the ramp starts.
        empty_from: progress from which on the mask is empty, whatever the input.
        fade: also fade the branch's factor from 1 to 0 along the ramp.
        share: instead of `fade`, the share of the whole that an unmasked branch has up to `begin`, in (0, 1); it falls
            to 0 along the ramp, in a straight line. A factor f on one of two averages is a share of f / (1 + f).
    """
    if progress >= empty_from:
        return MaskState(math.inf, 1.0 if share is None and not fade else 0.0)
    ramp = max(0.0, (progress - begin) / (empty_from - begin))
    threshold = SCHEDULES[schedule](ramp, start, end)
    if share is not None:
        left = share * (1.0 - ramp)
        return MaskState(threshold, left / (1.0 - left))
    return MaskState(threshold, 1.0 - ramp if fade else 1.0)
