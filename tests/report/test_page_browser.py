"""The report's page in headless Chromium: every plot and picture is shown and whole, the console is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from castling_det.report.render import html_page
from tests.report.browser import show
from tests.report.conftest import Demo
from tests.report.test_page import HOSTILE, hostile


def test_the_page_is_shown_whole(demo_page: str, tmp_path: Path) -> None:
    shown = show(demo_page, tmp_path)
    assert shown.console == []
    images = shown.found["images"]
    assert len(images) == 9 + 10 and all(image["whole"] for image in images)
    for image in images:
        width, height = image["size"]
        assert width > 200 and height > 150, image
    assert shown.found["overflow"] == 0, "nothing is wider than the window"
    assert shown.screenshot.size == (1200, 900)
    assert len(shown.screenshot.getcolors(1 << 20) or []) > 100, "the screenshot is not of an empty page"


def test_it_fits_a_telephone(demo_page: str, tmp_path: Path) -> None:
    shown = show(demo_page, tmp_path, width=500)
    assert shown.console == [] and shown.found["overflow"] == 0


def test_a_broken_picture_and_a_noisy_console_would_be_seen(demo_page: str, tmp_path: Path) -> None:
    start = demo_page.index("data:image/jpeg;base64,") + len("data:image/jpeg;base64,")
    broken = demo_page[:start] + "AAAA" + demo_page[start + 4 :]
    script = "<script>console.error('loud'); undefinedName();</script>"
    noisy = broken.replace("<main>", f"<main>{script}", 1)
    shown = show(noisy, tmp_path)
    assert [image["whole"] for image in shown.found["images"]].count(False) == 1
    assert len(shown.console) == 2 and "loud" in shown.console[0]


@pytest.mark.parametrize("group", range(5))
def test_hostile_names_run_nothing(demo: Demo, tmp_path: Path, group: int) -> None:
    shown = show(html_page(*hostile(demo, HOSTILE[group::5])), tmp_path)
    assert shown.console == [] and all(image["whole"] for image in shown.found["images"])
