"""The HTML page: every plot and picture is there, whole, and needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from castling_det.report import (
    html_page,
)
from castling_det.report.record import Series
from tests.report.conftest import Demo
from tests.report.records import make_report, make_run

VOID = {"meta", "img", "br", "link", "hr", "input", "use", "path", "rect"}


class Page(HTMLParser):
    """Collects what a browser would load or draw, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.plots: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids.add(values.get("id", ""))
        self.references += [values[key] for key in ("src", "href", "xlink:href", "srcset", "data") if key in values]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(values.values()))
        if tag == "img":
            self.images.append(values["src"])
        if tag == "svg":
            self.plots.append(values["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _decoded(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert re.fullmatch(r"data:image/(jpeg|png);base64", head)
    picture = Image.open(io.BytesIO(base64.b64decode(body, validate=True)))
    picture.load()
    return picture


def test_the_page_shows_every_plot_and_picture_and_needs_nothing_else(demo_page: str) -> None:
    text = demo_page
    page = Page(text)
    assert page.open == []
    assert page.plots == [
        "mAP over GMACs of every run",
        "mAP over latency of every run",
        "GMACs by kind of operation",
        "latency over input size, detector, forward, float32",
        "latency over input size, core, forward+backward, float32",
        "precision over recall of tree at IoU 0.50",
        "loss over training",
        "validation mAP, in [0, 1] over training",
        "kept fraction, in [0, 1] over training, by layer",
        "kept probability, in [0, 1] over training, by layer",
    ]
    assert len(page.images) == 3 * 3
    for uri in page.images:
        assert _decoded(uri).size == (512, 512)
    assert not re.search(r"https?:|//[a-z]|@import|<script", re.sub(r"base64,[^\"]*", "", text))
    local = [reference for reference in page.references if not reference.startswith("data:image/")]
    assert local and all(reference.startswith("#") and reference[1:] in page.ids for reference in local)
    assert "empty from 160" in page.text and "From iteration 160 on no layer keeps anything" in page.text
    detector = text[text.index("latency over input size, detector") :]
    assert "crossover: N = 20" in detector[: detector.index("</svg>")], "1e-4 N^2 meets 2e-3 N there"
    assert "noise & <boxes>" in page.text, "text is escaped, not interpreted"
    assert "score of at least 0.3" in page.text and "at least 0.5" in page.text
    assert "1 right, 0 wrong, 2 missed" in page.text and "3 right, 0 wrong, 0 missed" in page.text
    assert page.text.index("F1 of deploy 0.50 above softmax") < page.text.index("Every run")


def test_ids_of_several_drawings_do_not_collide(demo_page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", demo_page, flags=re.DOTALL)
    referenced = [set(re.findall(r'(?:href="#|url\(#)([\w-]+)', drawing)) for drawing in drawings]
    for names, drawing in zip(referenced, drawings, strict=True):
        for name in names:
            definitions = [other for other in drawings if f'id="{name}"' in other]
            bodies = {
                re.search(rf'<(\w+) id="{name}".*?</\1>|<path id="{name}".*?/>', d, re.DOTALL)[0] for d in definitions
            }  # type: ignore[index]
            assert f'id="{name}"' in drawing and len(bodies) == 1


def test_a_broken_picture_would_be_seen(demo_page: str) -> None:
    uri = Page(demo_page).images[0]
    with pytest.raises((OSError, ValueError)):
        _decoded(uri[: len(uri) // 2 // 4 * 4])


def test_a_run_has_one_colour_everywhere_and_both_themes_define_it(demo_page: str) -> None:
    text = demo_page
    used = set(re.findall(r"var\((--(?:run|layer)-\d)\)", text))
    light, dark = text.split("prefers-color-scheme: dark", 1)
    assert {"--run-0", "--run-1", "--run-2", "--layer-0", "--layer-7"} <= used
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)
    assert "#0101" not in text, "no stand-in colour is left"
    row = re.search(r"<td><span class=\"dot\" style=\"background:(var\(--run-\d\))\"></span>softmax</td>", text)
    assert row is not None and row.group(1) == "var(--run-0)"
    loss = text[text.index("loss over training") : text.index("validation mAP, in [0, 1] over training")]
    assert "var(--run-0)" in loss and "var(--run-1)" in loss


def test_pictures_are_the_ones_of_their_side(demo: Demo) -> None:
    row = demo.pictures[0]
    assert row.truth.tobytes() != row.baseline.tobytes() != row.deployed.tobytes()

    def has(picture: Image.Image, color: tuple[int, int, int]) -> bool:
        return color in {pixel for _, pixel in picture.getcolors(1 << 20) or []}

    missed, right = (255, 242, 0), (76, 195, 255)
    assert has(row.baseline, missed) and has(row.baseline, right)
    assert has(row.deployed, right) and not has(row.deployed, missed)
    assert has(row.truth, (255, 255, 255)) and not has(row.truth, right)


def test_any_mmdet_run_without_attention_and_mask_has_a_page(tmp_path: Path) -> None:
    series = Series((10, 20), (2.0, 1.0))
    runs = [dataclasses.replace(make_run(name, None, 0.2), scalars={"loss": series}) for name in ("softmax", "deploy")]
    page = Page(html_page(make_report(*runs)))
    assert page.plots == ["loss over training"]
    assert "No pictures" in page.text and "vanishes" not in page.text


def test_a_detector_that_scores_zero_is_drawn() -> None:
    runs = [dataclasses.replace(make_run(name, 0, mAP), gmacs=1.0) for name, mAP in (("softmax", 0.2), ("deploy", 0.0))]
    text = html_page(make_report(*runs))
    plot = text[text.index("mAP over GMACs of every run") : text.index("</svg>")]
    assert "var(--run-0)" in plot and "var(--run-1)" in plot
