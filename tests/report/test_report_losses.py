"""The table of final losses: the mean of the last quarter, paired by seed; a missing one is no zero."""

from __future__ import annotations

import pytest

from castling_det.report import final_loss, loss_table
from castling_det.report.record import Machine, Report, RunRecord
from castling_det.report.record_parts import Series

STEPS = tuple(range(1, 101))


def run(name, seed, last, *, status="ok", first=9.0):
    """A training of 100 iterations whose loss is `first`, and `last` from iteration 76 on."""
    values = tuple(last if step > 75 else first for step in STEPS)
    scalars = {"loss": Series(STEPS, values)}
    return RunRecord(name, status, "broke" if status == "failed" else None, seed, scalars=scalars)


def report(*runs):
    machine = Machine(torch="2", device="cpu", cpu="some", threads=1, python="3", commit=None)
    return Report("softmax", runs[-1].name, "data", "here", "now", machine, runs)


def rows(text):
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())}


def test_it_is_the_mean_of_the_last_quarter():
    assert final_loss(run("softmax", 0, 1.5)) == 1.5
    series = Series((10, 80, 90, 100), (5.0, 1.0, 2.0, 6.0))
    assert final_loss(RunRecord("x", "ok", scalars={"loss": series})) == 3.0


@pytest.mark.parametrize("series", [None, Series(), Series((50, 100), (1.0, None)), Series((80, 100), (1.0, None))])
def test_no_loss_and_one_that_is_not_finite_are_none(series):
    assert final_loss(RunRecord("x", "ok", scalars={} if series is None else {"loss": series})) is None


def test_differences_are_of_the_same_seed():
    """Seeds far apart, differences alike: unpaired they would have a spread of 1."""
    runs = [run("softmax", 0, 1.0), run("softmax", 1, 2.0), run("linear", 1, 2.1), run("linear", 0, 1.3)]
    table = rows(loss_table(report(*runs)))
    assert table["softmax"] == ["2", "1.500 ± 0.707", "baseline"]
    assert table["linear"] == ["2", "1.700 ± 0.566", "+0.200 ± 0.141"]


def test_a_failed_run_counts_for_nothing():
    runs = [run("softmax", 0, 1.0), run("linear", 0, 1.3), run("linear", 1, 7.0, status="failed")]
    assert rows(loss_table(report(*runs)))["linear"] == ["1", "1.300", "+0.300"]
