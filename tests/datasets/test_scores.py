"""The engraved scores: boxes fit the ink, sides share no composer, and a second run does nothing."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from castling_det import check_dataset

from .converters import engraving, scores

GLYPHS = {"E0A4": ("noteheadBlack", 0.0, -130.0, 300.0, 260.0), "E062": ("fClef", -20.0, -600.0, 700.0, 850.0)}
SVG = """<g class="page-margin" transform="translate(500, 400)">
<use xlink:href="#E0A4-x1" transform="translate(1000, 2000) scale(0.5, 0.5)" />
<use xlink:href="#E0A4-x1" transform="translate(1000, 2000) scale(0.5, 0.5)" />
<use xlink:href="#E062-x1" transform="translate(90, 1849) scale(1, 2)" />
<use xlink:href="#E999-x1" transform="translate(90, 1849) scale(1, 1)" /></g>"""


def test_boxes_come_from_the_font_table_and_a_symbol_of_two_voices_counts_once() -> None:
    note = engraving.Symbol("noteheadBlack", 150.0, 233.5, 165.0, 246.5)
    clef = engraving.Symbol("fClef", 57.0, 174.9, 127.0, 344.9)
    assert engraving.read_symbols(SVG, GLYPHS, 0.1) == sorted([note, clef])


def test_font_tables_are_read_by_code() -> None:
    glyph = b'<g c="E0A3" x="0.0" y="-132.0" w="314.0" h="270.0" n="noteheadHalf"><a n="stem" /></g>'
    assert engraving.read_glyphs(b"<bounding-boxes>" + glyph + b"</bounding-boxes>") == {
        "E0A3": ("noteheadHalf", 0.0, -132.0, 314.0, 270.0)
    }


@pytest.mark.parametrize("seed", range(5))
def test_boxes_follow_the_rotation(seed: int) -> None:
    pixels = np.full((900, 700), 255, np.uint8)
    symbols = []
    for x, y, half_width, half_height in ((60, 50, 14, 10), (640, 70, 12, 45), (350, 450, 30, 8), (90, 840, 9, 30)):
        cv2.ellipse(pixels, (x, y), (half_width, half_height), 0, 0, 360, 0, -1)
        symbols.append(engraving.Symbol("s", x - half_width, y - half_height, x + half_width + 1, y + half_height + 1))
    page = engraving.degrade(engraving.Page(pixels, symbols), np.random.default_rng(seed))
    assert page.pixels.dtype == np.uint8 and page.pixels.shape == pixels.shape
    count, _, found, _ = cv2.connectedComponentsWithStats(
        (cv2.GaussianBlur(page.pixels, (0, 0), 1.5) < 130).astype(np.uint8)
    )
    assert count == len(symbols) + 1
    boxes = sorted((x, y, x + w, y + h) for x, y, w, h, _ in found[1:])
    np.testing.assert_allclose(boxes, sorted(symbol[1:] for symbol in page.symbols), atol=2.0)


def test_degradation_is_seeded() -> None:
    page = engraving.Page(np.full((300, 200), 255, np.uint8), [engraving.Symbol("s", 10, 20, 30, 40)])
    first, again, other = (engraving.degrade(page, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.symbols == again.symbols and np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


def corpus_of(**members: bytes) -> zipfile.ZipFile:
    """A wheel in memory with these members; `__` in a name is a slash, `_dot_` a dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr("music21/corpus/" + name.replace("__", "/").replace("_dot_", "."), content)
    return zipfile.ZipFile(buffer)


def test_encodings_are_read_from_every_container() -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        archive.writestr("piece.xml", "<?xml encoding='UTF-16'?><score/>".encode("utf-16"))
    corpus = corpus_of(a__b_dot_mxl=inner.getvalue(), a__c_dot_abc="% notes\nX:1\nT:Á\nX: 2\nT:B\n".encode("latin-1"))
    assert engraving.read_music(corpus, "music21/corpus/a/b.mxl") == ["<?xml encoding='UTF-8'?><score/>"]
    assert engraving.read_music(corpus, "music21/corpus/a/c.abc") == ["X:1\nT:Á\n", "X: 2\nT:B\n"]


@pytest.mark.parametrize(
    "setting",
    [{"long_side": 100}, {"limit": 0}, {"paper": (20, 300)}, {"splits": ("val",)}, {"splits": ("train", "x")}],
)
def test_wrong_settings_are_named(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=rf"{name}=.*: expected"):
        scores.Settings(**setting)


def test_a_failing_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(scores.PreparationError, match=r"pip could not download music21(.|\n)*copy the wheels"):
        scores.prepare(tmp_path / "scores", scores.Settings(limit=1))
    assert not (tmp_path / "scores" / "annotations").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages of each split, from the real wheels."""
    root = tmp_path_factory.mktemp("data") / "scores"
    complete = Path(__file__).parents[2] / "data" / "scores" / "cache"
    if complete.is_dir():
        (root / "cache").mkdir(parents=True)
        for wheel in complete.glob("*.whl"):
            (root / "cache" / wheel.name).symlink_to(wheel)
    try:
        scores.prepare(root, scores.Settings(limit=2))
    except scores.PreparationError as error:
        pytest.skip(f"no package index: {error}")
    return root


def annotations(root: Path, split: str) -> dict[str, Any]:
    """The COCO file of a split."""
    content: dict[str, Any] = json.loads((root / "annotations" / f"{split}.json").read_text())
    return content


@pytest.mark.parametrize("split", scores.SPLITS)
def test_pages_pass_the_check(prepared: Path, split: str) -> None:
    assert check_dataset(prepared / "annotations" / f"{split}.json", image_root=prepared / split, level="pixels") == []


def test_boxes_hold_the_ink(prepared: Path) -> None:
    coco = annotations(prepared, "train")
    notes = {c["id"] for c in coco["categories"] if c["name"] == "noteheadBlack"}
    for image in coco["images"]:
        pixels = cv2.imread(str(prepared / "train" / image["file_name"]), cv2.IMREAD_GRAYSCALE)
        boxes = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"] and a["category_id"] in notes]
        inside = [pixels[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1].mean() for x, y, w, h in boxes]
        assert len(boxes) > 5 and np.mean(inside) < 0.65 * np.median(pixels)


def test_sides_share_no_composer_and_one_font_is_never_trained_on(prepared: Path) -> None:
    seen = {split: annotations(prepared, split)["images"] for split in scores.SPLITS}
    assert all(len(images) == 2 for images in seen.values())
    names = {split: {image["collection"] for image in images} for split, images in seen.items()}
    assert not names["train"] & names["test"] and not names["val"] & (names["train"] | names["test"])
    assert {image["font"] for image in seen["test_petaluma"]} == {engraving.UNSEEN_FONT}
    assert engraving.UNSEEN_FONT not in {image["font"] for split in ("train", "test") for image in seen[split]}


def test_a_second_run_does_nothing(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "build", lambda *_: pytest.fail("built again"))
    assert scores.prepare(prepared, scores.Settings(limit=2))[1]
