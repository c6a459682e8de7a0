"""The schedules as pure functions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from castling_det.engine import SCHEDULES, mask_state

RAMPS = sorted(set(SCHEDULES) - {"constant"})


def at(progress, schedule="geometric", **options):
    return mask_state(progress, schedule=schedule, **{"start": 0.02, "end": 1.0, **options})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_starts_at_start_and_ends_empty(schedule):
    assert at(0.0, schedule).threshold == pytest.approx(0.02)
    assert at(0.8, schedule).threshold == math.inf == at(1.0, schedule).threshold
    assert at(0.7999, schedule).threshold < 1.01


@pytest.mark.parametrize("schedule", RAMPS)
def test_ramps_are_monotone_and_reach_end(schedule):
    values = [at(i / 1000, schedule, begin=0.1).threshold for i in range(800)]
    assert values[:101] == pytest.approx([0.02] * 101)
    assert all(later > earlier for earlier, later in pairwise(values[101:]))
    assert at(0.8 - 1e-9, schedule).threshold == pytest.approx(1.0)


def test_middles():
    """Half-way: arithmetic mean, its cosine equal, geometric mean."""
    half = {name: at(0.4, name).threshold for name in SCHEDULES}
    assert half["constant"] == 0.02
    assert half["linear"] == pytest.approx(0.51) == half["cosine"]
    assert half["geometric"] == pytest.approx(math.sqrt(0.02))
    assert at(0.2, "cosine").threshold < at(0.2, "linear").threshold


def test_fade():
    assert [at(p, fade=True).aux_scale for p in (0.0, 0.4, 0.8, 1.0)] == pytest.approx([1, 0.5, 0, 0])
    assert at(0.4).aux_scale == 1.0


def test_share():
    """A factor f on one of two averages weighs f / (1 + f) of their sum, which falls in a straight line."""
    states = [at(p, "constant", start=0.0, begin=0.2, share=0.98) for p in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert [state.aux_scale / (1 + state.aux_scale) for state in states] == pytest.approx([0.98, 0.98, 0.49, 0, 0])
    assert [state.threshold for state in states] == [0.0, 0.0, 0.0, math.inf, math.inf]
