"""Music as pages: verovio engraves an encoding, resvg draws it, the font's table says where each symbol lies.

A page is then degraded as a scan is, and the boxes follow.
"""

from __future__ import annotations

import importlib
import io
import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FONTS = ("Leipzig", "Leland", "Bravura", "Gootville")
UNSEEN_FONT = "Petaluma"
FALLBACK_FONT = "Leipzig"  # verovio draws from it what a font lacks
# The page in verovio's units (1/10 mm), and half the distance of two staff lines in the same units.
PAGE_WIDTH, PAGE_HEIGHT = 1600, 2200
UNITS = (8, 9, 10)
MIN_FILLED = 0.5


class Job(NamedTuple):
    """What one process engraves at a time: a piece, or a few tunes that share pages."""

    collection: str
    split: str
    number: int
    members: tuple[str, ...]
    font: str
    max_pages: int

    @property
    def name(self) -> str:
        """Start of the pages' file names, and the seed of the job's random numbers."""
        return f"{self.collection}_{self.number:03d}"


class Symbol(NamedTuple):
    """A symbol's SMuFL name and its box by corners in pixels, as continuous coordinates."""

    name: str
    x0: float
    y0: float
    x1: float
    y1: float


class Page(NamedTuple):
    """A grey picture and the symbols on it."""

    pixels: NDArray[np.uint8]  # (H, W)
    symbols: list[Symbol]


Glyphs = dict[str, tuple[str, float, float, float, float]]
"""SMuFL code -> name, x, y, width and height in 1/1000 em, y upwards."""


def read_glyphs(table: bytes) -> Glyphs:
    """Reads one of verovio's tables, data/FONT.xml."""
    return {
        glyph.attrib["c"]: (glyph.attrib["n"], *(float(glyph.attrib[key]) for key in "xywh"))  # type: ignore[misc]
        for glyph in ElementTree.fromstring(table).iter("g")
    }


USE = re.compile(
    r'<use xlink:href="#([0-9A-F]+)-[^"]*" transform="translate\(([-\d.]+), ([-\d.]+)\) scale\(([-\d.]+), ([-\d.]+)\)"'
)
MARGIN = re.compile(r'class="page-margin" transform="translate\(([-\d.]+), ([-\d.]+)\)"')


def read_symbols(svg: str, glyphs: Glyphs, scale: float) -> list[Symbol]:
    """The symbols of an engraved page; `scale` is in pixels per unit of the SVG's inner coordinates.

    A symbol that two voices share is drawn twice in one place; it counts once.
    """
    margin = MARGIN.search(svg)
    if margin is None:
        return []
    left, top = map(float, margin.groups())
    symbols = set()
    for code, *numbers in USE.findall(svg):
        if code not in glyphs:
            continue
        name, x, y, width, height = glyphs[code]
        dx, dy, sx, sy = map(float, numbers)
        x0, y0 = left + dx + sx * x, top + dy - sy * (y + height)
        corners = (x0, y0, x0 + sx * width, y0 + sy * height)
        symbols.add(Symbol(name, *(round(scale * value, 2) for value in corners)))
    return sorted(symbols)


def degrade(page: Page, rng: np.random.Generator) -> Page:
    """Makes a scan of a clean page: turned by up to 1 degree, blurred, unevenly lit, noisy; the boxes follow.

    A turned symbol's box is computed as if the symbol were an ellipse: as its circumscribed rectangle the box would
    grow by up to 2% of the symbol's longer side beyond the ink.
    """
    height, width = page.pixels.shape
    strength = max(height, width) / 1280
    angle = rng.uniform(-1.0, 1.0)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    pixels = cv2.warpAffine(page.pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=255)
    pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.3, 0.9) * strength)
    ink, paper = rng.uniform(0, 70), rng.uniform(215, 255)
    light = cv2.resize(rng.uniform(0.8, 1.0, (3, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    values: NDArray[Any] = (ink + (paper - ink) / 255 * pixels) * light
    values += rng.uniform(1.0, 5.0) * rng.standard_normal(values.shape, dtype=np.float32)
    return Page(
        np.clip(values, 0, 255).astype(np.uint8),
        [rotate(symbol, matrix, np.deg2rad(angle), width, height) for symbol in page.symbols],
    )


def rotate(symbol: Symbol, matrix: NDArray[Any], angle: float, width: int, height: int) -> Symbol:
    """The box after `matrix`, which acts on pixel centres, inside the page."""
    centre = np.array([(symbol.x0 + symbol.x1) / 2 - 0.5, (symbol.y0 + symbol.y1) / 2 - 0.5, 1.0])
    x, y = matrix @ centre + 0.5
    across, along = (symbol.x1 - symbol.x0) / 2, (symbol.y1 - symbol.y0) / 2
    half_width = np.hypot(across * np.cos(angle), along * np.sin(angle))
    half_height = np.hypot(across * np.sin(angle), along * np.cos(angle))
    x0, y0, x1, y1 = x - half_width, y - half_height, x + half_width, y + half_height
    x0, x1 = (round(float(np.clip(value, 0, width)), 2) for value in (x0, x1))
    y0, y1 = (round(float(np.clip(value, 0, height)), 2) for value in (y0, y1))
    return Symbol(symbol.name, x0, y0, x1, y1)


class Engraver:
    """Turns jobs into pages; one lives in each process."""

    def __init__(self, wheels: dict[str, Path], unpacked: Path, long_side: int) -> None:
        cv2.setNumThreads(1)
        sys.path.insert(0, str(unpacked))
        verovio, resvg = importlib.import_module("verovio"), importlib.import_module("resvg_py")
        verovio.enableLog(verovio.LOG_OFF)
        self.toolkit = verovio.toolkit(False)
        self.toolkit.setResourcePath(str(unpacked / "verovio" / "data"))
        self.draw = resvg.svg_to_bytes
        self.corpus = zipfile.ZipFile(wheels["music21"])
        data = unpacked / "verovio" / "data"
        fallback = read_glyphs((data / f"{FALLBACK_FONT}.xml").read_bytes())
        self.glyphs = {
            font: fallback | read_glyphs((data / f"{font}.xml").read_bytes()) for font in (*FONTS, UNSEEN_FONT)
        }
        # Text is drawn with the fonts that Matplotlib brings: a machine's own would make its pages differ.
        fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self.text_fonts = [str(fonts / f"DejaVuSerif{style}.ttf") for style in ("", "-Bold", "-Italic")]
        self.height = long_side
        self.width = round(long_side * PAGE_WIDTH / PAGE_HEIGHT)

    def pages(self, job: Job) -> Iterator[Page]:
        """Fills pages with the job's engraved strips, from top to bottom; leaves out a page emptier than MIN_FILLED."""
        rng = np.random.default_rng(zlib.crc32(job.name.encode()))
        unit = int(rng.choice(UNITS))
        pixels, symbols, filled = self._empty(), list[Symbol](), 0
        for strip in self._strips(job, unit):
            height = min(len(strip.pixels), self.height)
            if filled + height > self.height:
                if filled >= MIN_FILLED * self.height:
                    yield degrade(Page(pixels, symbols), rng)
                pixels, symbols, filled = self._empty(), [], 0
            pixels[filled : filled + height] = strip.pixels[:height]
            symbols += [s._replace(y0=s.y0 + filled, y1=s.y1 + filled) for s in strip.symbols]
            filled += height
        if filled >= MIN_FILLED * self.height:
            yield degrade(Page(pixels, symbols), rng)

    def _empty(self) -> NDArray[np.uint8]:
        return np.full((self.height, self.width), 255, np.uint8)

    def _strips(self, job: Job, unit: int) -> Iterator[Page]:
        """Each engraved page of each piece, no higher than its music; of a long piece, pages spread evenly."""
        options = {"font": job.font, "unit": unit, "pageWidth": PAGE_WIDTH, "pageHeight": PAGE_HEIGHT}
        self.toolkit.setOptions({**options, "adjustPageHeight": True, "footer": "none", "header": "auto"})
        for music in itertools.chain.from_iterable(read_music(self.corpus, name) for name in job.members):
            if not self.toolkit.loadData(music):
                continue  # a few encodings are beyond verovio's readers
            count = self.toolkit.getPageCount()
            chosen = np.unique(np.linspace(1, count, min(count, job.max_pages)).round().astype(int))
            for number in chosen.tolist():
                svg = self.toolkit.renderToSVG(number)
                png = self.draw(
                    svg_string=svg,
                    background="white",
                    width=self.width,
                    skip_system_fonts=True,
                    font_files=self.text_fonts,
                    serif_family="DejaVu Serif",
                )
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
                scale = self.width / (10 * PAGE_WIDTH)  # the SVG's inner coordinates are tenths of a unit
                yield Page(pixels, read_symbols(svg, self.glyphs[job.font], scale))


def read_music(corpus: zipfile.ZipFile, name: str) -> list[str]:
    """The encodings in a member of the corpus: MusicXML, plain or zipped, or the tunes of an ABC file."""
    content = corpus.read(name)
    if name.endswith(".mxl"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inner = [part for part in archive.namelist() if not part.startswith("META-INF") and part[-1] != "/"]
            content = archive.read(inner[0])
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return [content.decode("utf-16").replace("UTF-16", "UTF-8", 1)]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if name.endswith(".abc"):
        return [tune for tune in re.split(r"^(?=X: *\d)", text, flags=re.MULTILINE) if tune.startswith("X:")]
    return [text]
