"""Cutting an image into tiles, and deciding which box counts in which tile.

Boxes are (x0, y0, x1, y1) in pixels, corners as continuous coordinates: a box covers [x0, x1) x [y0, y1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "PlacedBox", "Tile", "place_boxes", "tile_grid", "tile_starts"]


class Box(NamedTuple):
    """A rectangle by its corners, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Square pixels; 0 for an empty box."""
        return max(self.x1 - self.x0, 0.0) * max(self.y1 - self.y0, 0.0)


class Tile(NamedTuple):
    """A window of the image: its upper left pixel and its size in pixels."""

    x: int
    y: int
    width: int
    height: int


class PlacedBox(NamedTuple):
    """The part of a source box that shows in one tile.

    `number` is the box's place in the source list, `box` is in the tile's own coordinates, `visible` is the
    shown fraction of the box's area in (0, 1], `ignored` says that the part is neither a target nor a
    mistake.
    """

    number: int
    box: Box
    visible: float
    ignored: bool


def tile_starts(length: int, size: int, max_stride: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` pixels with strides of at most `max_stride`.

    The tiles are spread evenly and all lie inside: the last one ends at the last pixel, nothing is padded.
    An axis shorter than a tile gets the one start 0.
    """
    for name, value in (("length", length), ("size", size), ("max_stride", max_stride)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected a positive number of pixels.")
    if max_stride > size:
        raise ValueError(
            f"max_stride={max_stride} is larger than size={size} and would leave gaps between tiles."
        )
    if length <= size:
        return [0]
    steps = math.ceil((length - size) / max_stride)
    return [i * (length - size) // steps for i in range(steps + 1)]


def tile_grid(width: int, height: int, size: int, max_stride: int) -> list[Tile]:
    """Tiles row by row, `size` pixels square, or smaller along an axis on which the image is smaller."""
    return [
        Tile(x, y, min(size, width), min(size, height))
        for y in tile_starts(height, size, max_stride)
        for x in tile_starts(width, size, max_stride)
    ]


def _shown(box: Box, tile: Tile) -> Box:
    return Box(
        max(box.x0 - tile.x, 0.0),
        max(box.y0 - tile.y, 0.0),
        min(box.x1 - tile.x, float(tile.width)),
        min(box.y1 - tile.y, float(tile.height)),
    )


def _off_centre(box: Box, tile: Tile) -> float:
    """Squared distance between the centres of box and tile."""
    dx = (box.x0 + box.x1) / 2 - (tile.x + tile.width / 2)
    dy = (box.y0 + box.y1) / 2 - (tile.y + tile.height / 2)
    return dx * dx + dy * dy


def place_boxes(
    boxes: Sequence[Box], tiles: Sequence[Tile], *, min_visible: float, once: bool
) -> list[list[PlacedBox]]:
    """For each tile the parts of the boxes that show in it, in source order.

    A part counts if at least the fraction `min_visible` of the box's area shows; a smaller part is `ignored`.
    With `once`, a box counts in one tile only: where most of it shows, of equals the one whose centre is
    nearest, of equals the first; its parts in all other tiles are `ignored`. Slivers thinner than a pixel are
    left out.
    """
    if not 0.0 < min_visible <= 1.0:
        raise ValueError(f"min_visible={min_visible}: expected a fraction above 0 and at most 1.")
    placed: list[list[PlacedBox]] = [[] for _ in tiles]
    for number, box in enumerate(boxes):
        parts: list[tuple[int, Box, float]] = []
        for place, tile in enumerate(tiles):
            part = _shown(box, tile)
            if part.x1 - part.x0 >= 1.0 and part.y1 - part.y0 >= 1.0:
                parts.append((place, part, min(part.area / box.area, 1.0)))
        if not parts:
            continue
        owner = max(parts, key=lambda part: (part[2], -_off_centre(box, tiles[part[0]])))[0]
        for place, part, visible in parts:
            ignored = visible < min_visible or (once and place != owner)
            placed[place].append(PlacedBox(number, part, visible, ignored))
    return placed
