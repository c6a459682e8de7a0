"""Pictures of tools/attention.py in the report's page."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from castling_det.report import read_attention, write_report
from castling_det.report.attention_maps import AttentionPicture


@pytest.fixture
def folder(tmp_path):
    for name, width, caption in (("b", 30, "blocks.1, <mode> 'linear'"), ("a", 20, "blocks.0, cos/π")):
        AttentionPicture(Image.new("RGB", (width, 8), (200, 10, 10)), caption).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_folder_is_read_by_name(folder):
    assert [picture.image.width for picture in read_attention(folder)] == [20, 30]
    assert [picture.caption for picture in read_attention(folder / "b.png")] == ["blocks.1, <mode> 'linear'"]


def test_the_page_holds_picture_and_caption(folder, demo, tmp_path):
    write_report(tmp_path / "out", demo.report, demo.pictures, read_attention(folder))
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    section = page[page.index("Where the attention looks") :]
    sources = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" width="(\d+)"', section)
    assert [width for _, width in sources] == ["20", "30"]
    image = Image.open(io.BytesIO(base64.b64decode(sources[0][0])))
    assert image.size == (20, 8) and abs(image.getpixel((10, 4))[0] - 200) < 12
    assert "blocks.1, &lt;mode&gt; &#x27;linear&#x27;" in section and "cos/π" in section
    write_report(tmp_path / "out", demo.report, demo.pictures)
    assert "Where the attention looks" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_errors_name_the_path(folder, tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path, "c.png: has no caption"),
        (tmp_path / "empty", "no .png"),
        (tmp_path / "x", "no such"),
    ):
        with pytest.raises(ValueError, match=message):
            read_attention(path)
