"""What a preparation made, as plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .coco_writer import SourceImage

__all__ = ["PreparationSummary", "SourceSummary", "SplitSummary"]


@dataclass(frozen=True)
class SourceSummary:
    """One source image in pixels, its usable boxes, and what was clipped or dropped on the way."""

    name: str
    width: int
    height: int
    boxes: int
    clipped: int
    dropped_empty: int
    dropped_duplicate: int

    @classmethod
    def of(cls, source: SourceImage) -> SourceSummary:
        """Counts of a loaded image."""
        found = source.annotations
        size = (source.pixels.width, source.pixels.height)
        counts = (len(found.boxes), found.clipped, found.dropped_empty, found.dropped_duplicate)
        return cls(source.name, *size, *counts)


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    `boxes` counts targets over all tiles, `ignored` the parts marked `iscrowd`, `never_counted` the source
    boxes that are a target in no tile.
    """

    split: str
    sources: tuple[SourceSummary, ...]
    tiles: int
    tiles_without_boxes: int
    boxes: int
    ignored: int
    never_counted: int


@dataclass(frozen=True)
class PreparationSummary:
    """All splits; `reused` says that the folder was complete already and nothing was written."""

    splits: tuple[SplitSummary, ...]
    source_sha256: str
    reused: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without `reused`."""
        value = asdict(self)
        del value["reused"]
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, reused: bool) -> PreparationSummary:
        """The inverse of `to_dict`."""
        splits = tuple(
            SplitSummary(
                **{**split, "sources": tuple(SourceSummary(**source) for source in split["sources"])}
            )
            for split in value["splits"]
        )
        return cls(splits=splits, source_sha256=value["source_sha256"], reused=reused)
