"""The report's page in headless Chromium: every plot and picture is shown and whole, the console is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from castling_det.report.render import html_page
from tests.report.browser import show
from tests.report.conftest import Demo
from tests.report.test_page import HOSTILE, PLOTS, hostile


def test_the_page_is_shown_whole(demo_page: str, tmp_path: Path) -> None:
    shown = show(demo_page, tmp_path)
    assert shown.console == []
    images = shown.found["images"]
    assert len(images) == 9 + len(PLOTS) and all(image["whole"] for image in images)
    for image in images:
        width, height = image["size"]
        assert width > 200 and height > 150, image
    assert shown.found["overflow"] == 0, "nothing is wider than the window"
    assert shown.screenshot.size == (1200, 900)
    assert len(shown.screenshot.getcolors(1 << 20) or []) > 100, "the screenshot is not of an empty page"


def test_it_fits_a_telephone(demo_page: str, tmp_path: Path) -> None:
    shown = show(demo_page, tmp_path, width=500)
    assert shown.console == [] and shown.found["overflow"] == 0


@pytest.mark.parametrize("group", range(5))
def test_hostile_names_run_nothing(demo: Demo, tmp_path: Path, group: int) -> None:
    shown = show(html_page(*hostile(demo, HOSTILE[group::5])), tmp_path)
    assert shown.console == [] and all(image["whole"] for image in shown.found["images"])
