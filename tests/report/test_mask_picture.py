"""The picture of a vanishing mask shows schedules and record, and refuses runs that logged none."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.axes
import numpy as np
import pytest

from castling_det.analysis.mask_picture import mask_picture

SETTINGS = dict(start=1.0, end=64.0, begin=0.1, empty_from=0.5)


@pytest.fixture
def castling(demo):
    return next(run for run in demo.report.runs if run.mask.kept_fraction)


def test_lines_are_schedules_and_record(castling, monkeypatch):
    drawn, plot = {}, matplotlib.axes.Axes.plot

    def spy(axes, x, y, **options):
        drawn[options["label"]] = np.array(x, float), np.array(y, float)
        return plot(axes, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    picture = mask_picture(castling, **SETTINGS)
    assert picture.width > 2 * picture.height > 400
    progress, threshold = drawn["geometric"]
    np.testing.assert_allclose(np.interp(0.3, progress, threshold), 8.0, rtol=1e-2)  # half of the way from 1 to 64
    assert np.all(threshold[progress <= 0.1] == 1.0)
    assert progress.max() < 0.5 and {"constant", "linear", "cosine"} < set(drawn)
    for layer, series in castling.mask.kept_fraction.items():
        np.testing.assert_array_equal(drawn[layer][0], series.steps)
        np.testing.assert_array_equal(drawn[layer][1], np.array(series.values, float))


def test_a_run_without_a_mask_is_refused(castling):
    bare = replace(castling, mask=replace(castling.mask, kept_fraction={}))
    with pytest.raises(ValueError, match="logged no mask"):
        mask_picture(bare, **SETTINGS)
