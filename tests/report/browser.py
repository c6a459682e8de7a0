"""A page as headless Chromium shows it: its screenshot, what the console said, and the state of every picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=10000", "--timeout=60000",
)  # fmt: skip

# Runs behind the page's own content; what it finds stands in the document that Chromium prints.
_PROBE = """<script>
window.addEventListener("load", () => {
  const size = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const found = {
    images: [...document.images].map(i => ({whole: i.complete && i.naturalWidth > 0, size: size(i)})),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight};
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.hidden = true; pre.textContent = JSON.stringify(found);
  document.body.appendChild(pre);
});
</script>"""


class Shown(NamedTuple):
    """`found` as the probe has it: images, overflow in pixels to the right, height in pixels."""

    found: dict[str, Any]
    console: list[str]
    screenshot: Image.Image


def show(page: str, folder: Path, *, width: int = 1200, height: int = 900) -> Shown:
    """Opens a page; the test is skipped where no Chromium is installed."""
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(_NAMES)})")
    path = folder / "page.html"
    path.write_text(page.replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    picture = folder / "screenshot.png"
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command += [f"--screenshot={picture}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="probe"[^>]*>(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match is not None, done.stdout[-500:] + done.stderr[-2000:]
    with Image.open(picture) as opened:
        screenshot = opened.convert("RGB")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(json.loads(unescape(match.group(1))), console, screenshot)
