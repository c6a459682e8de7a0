"""Pictures of tools/attention.py in a report's page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from castling_det.report.attention_maps import AttentionPicture, read_picture
from castling_det.report.gallery import data_uri

__all__ = ["attention_section", "read_attention"]


def read_attention(path: Path) -> list[AttentionPicture]:
    """The picture in a PNG of tools/attention.py, or those of all PNGs in a folder, by name.

    Raises:
        ValueError: no such file, no PNG in the folder, or a PNG that tools/attention.py did not write.
    """
    if not path.exists():
        raise ValueError(f"--attention {path}: no such file or folder; tools/attention.py writes the pictures")
    files = sorted(path.glob("*.png")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--attention {path}: no .png in this folder; tools/attention.py writes them")
    return [read_picture(file) for file in files]


def attention_section(pictures: Sequence[AttentionPicture]) -> str:
    """The section, or nothing without pictures."""
    figures = "".join(
        f'<figure><img src="{data_uri(picture.image)}" width="{picture.image.width}" height="{picture.image.height}" '
        f'style="max-width:100%;height:auto" alt="attention of {escape(picture.caption.partition(",")[0])}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return f"<h2>Where the attention looks</h2>{figures}" if figures else ""
