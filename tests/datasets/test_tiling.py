"""Tiles cover the image; every part of a box maps back to its source."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets.converters import tree_crowns

Box, place_boxes = tree_crowns.Box, tree_crowns.place_boxes
tile_grid, tile_starts = tree_crowns.tile_grid, tree_crowns.tile_starts


def gaps(starts: list[int], length: int, size: int) -> bool:
    """Whether some pixel of the axis lies in no tile."""
    covered = {pixel for start in starts for pixel in range(start, min(start + size, length))}
    return len(covered) < length


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, list[tree_crowns.Tile]]:
    width, height, size = draw(st.integers(20, 300)), draw(st.integers(20, 300)), draw(st.integers(16, 128))
    return width, height, tile_grid(width, height, size, draw(st.integers(max(size // 4, 1), size)))


@st.composite
def box_in(draw: st.DrawFn, width: int, height: int) -> Box:
    x0, y0 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    return Box(x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))


@given(length=st.integers(1, 700), size=st.integers(1, 300), data=st.data())
def test_tiles_cover_the_axis_stay_inside_and_are_the_fewest(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    starts = tile_starts(length, size, stride)
    assert not gaps(starts, length, size)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + size == length or (starts == [0] and length <= size)
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))
    assert len(starts) == 1 + math.ceil(max(length - size, 0) / stride)
    assert gaps([], length, size), "the check notices a missing tile"


@settings(deadline=None)
@given(grid=grids(), min_visible=st.floats(0.05, 1.0), once=st.booleans(), data=st.data())
def test_every_placed_box_maps_back(
    grid: tuple[int, int, list[tree_crowns.Tile]], min_visible: float, once: bool, data: st.DataObject
) -> None:
    width, height, tiles = grid
    boxes = data.draw(st.lists(box_in(width, height), min_size=1, max_size=6))
    placed = place_boxes(boxes, tiles, min_visible=min_visible, once=once)
    assert len(placed) == len(tiles)
    shown: dict[int, list[tuple[float, bool]]] = {number: [] for number in range(len(boxes))}
    for tile, parts in zip(tiles, placed, strict=True):
        for part in parts:
            box, source = part.box, boxes[part.number]
            assert 0 <= box.x0 < box.x1 <= tile.width and 0 <= box.y0 < box.y1 <= tile.height
            back = Box(box.x0 + tile.x, box.y0 + tile.y, box.x1 + tile.x, box.y1 + tile.y)
            window = (tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)
            assert back.x0 == max(source.x0, window[0]) and back.x1 == min(source.x1, window[2])
            assert back.y0 == max(source.y0, window[1]) and back.y1 == min(source.y1, window[3])
            assert part.visible == pytest.approx(back.area / source.area)
            shown[part.number].append((part.visible, part.ignored))
    for parts_of_box in shown.values():
        assert parts_of_box, "every box of whole pixels shows in some tile, since the tiles cover the image"
        counted = [visible for visible, ignored in parts_of_box if not ignored]
        best = max(visible for visible, _ in parts_of_box)
        if once:
            assert counted == ([best] if best >= min_visible else [])
        else:
            assert len(counted) == sum(visible >= min_visible for visible, _ in parts_of_box)


def test_a_box_in_an_overlap_counts_in_the_tile_with_the_nearest_centre() -> None:
    tiles = tile_grid(width=100, height=64, size=64, max_stride=64)
    assert [tile.x for tile in tiles] == [0, 36]
    placed = place_boxes([Box(52, 10, 62, 20)], tiles, min_visible=0.4, once=True)
    assert [part.ignored for parts in placed for part in parts] == [True, False]
