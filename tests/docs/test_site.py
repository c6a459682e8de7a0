"""The pages build without a warning, hold together, need nothing from the network, and show their equations."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from castling_det import __version__

pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


def build(root, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """What a page loads and links to, its ids, and its equations."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.ids, self.equations = [], [], set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.equations += tag == "math"
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if given.get(LOADED.get(tag, "")):
            self.loaded.append(given[LOADED[tag]])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_built(pages):
    sources = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in pages} == sources


def test_every_page_is_in_the_navigation(site, pages):
    links = set(re.findall(r'<a href="([\w-]+)\.html" class="md-nav__link', (site / "index.html").read_text("utf-8")))
    assert links | {"index"} == {path.stem for path in pages}


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"(https?:)?//", address), f"{path.name} loads {address}"
            assert (path.parent / address.partition("?")[0].partition("#")[0]).exists(), f"{path.name}: {address}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"url\([\"']?https?:", text) and "@import" not in text, style


def test_search_works_from_a_folder(site, pages):
    """There a page can neither fetch the index nor start a worker: the one is a script, the other an iframe."""
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    found = json.loads(index.removeprefix("var __index = "))["docs"]
    assert {entry["location"].partition("#")[0] for entry in found} == {f"{path.stem}.html" for path in pages}
    assert any("multiply-add" in entry["text"] for entry in found)
    for path, page in pages.items():
        assert "javascripts/iframe-worker.js" in page.loaded, path.name


def test_pages_say_their_version(site, pages):
    for path in pages:
        assert f"castling_det {__version__}</title>" in path.read_text(encoding="utf-8"), path.name


def test_links_and_anchors_lead_somewhere(pages):
    checked = 0
    for path, page in pages.items():
        for address in page.links:
            if re.match(r"[a-z]+:", address):
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {address}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{path.name}: {address}"
            checked += 1
    assert checked > 100


def test_equations_are_drawn_by_the_browser_itself(site, pages):
    source = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
    (derivation,) = [page for path, page in pages.items() if path.stem == "derivation"]
    assert derivation.equations == source.count("```math") > 5
    text = (site / "derivation.html").read_text(encoding="utf-8")
    assert "\\frac" not in text and "<mfrac>" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[no such anchor](index.md#nowhere)", "#nowhere"),
        ("[outside](../castling_det/gone.py)", "no such file in the repository"),
    ],
)
def test_a_broken_link_stops_the_build(tmp_path, text, message):
    shutil.copytree(ROOT / "docs" / "hooks", tmp_path / "docs" / "hooks")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(config[: config.index("\nnav:")], encoding="utf-8")
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and message in done.stdout + done.stderr
