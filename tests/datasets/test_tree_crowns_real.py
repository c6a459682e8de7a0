"""The prepared real data, where it is there: counts of the sources, and sums over tiles."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from castling_det.datasets.checks import check_annotation_file
from castling_det.datasets.tree_crowns import DEEPFOREST, prepare

ROOT = Path(__file__).parents[2] / "data" / "tree_crowns"

pytestmark = pytest.mark.skipif(
    not (ROOT / "prepared.json").is_file(),
    reason="data/tree_crowns is not prepared: tools/prepare_tree_crowns.py",
)


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "annotations" / f"{name}.json").read_text())
    return data


def by_source(data: dict[str, Any]) -> dict[tuple[str, int], list[tuple[list[float], bool]]]:
    """Boxes in source coordinates, and whether each is ignored, by source image and box number."""
    images = {image["id"]: image for image in data["images"]}
    found = defaultdict(list)
    for a in data["annotations"]:
        image = images[a["image_id"]]
        (x, y), (left, top, width, height) = image["offset"], a["bbox"]
        box = [left + x, top + y, left + x + width, top + y + height]
        found[image["source"], a["source_box"]].append((box, bool(a["iscrowd"])))
    return found


def test_counts_of_the_sources() -> None:
    stamp = json.loads((ROOT / "prepared.json").read_text())
    assert stamp["request"]["source_sha256"] == DEEPFOREST.sha256
    counts = {source["name"]: source["boxes"] for split in stamp["summary"]["splits"] for source in split["sources"]}
    assert counts == {
        "2019_YELL_2_528000_4978000_image_crop2": 574,
        "2019_YELL_2_541000_4977000_image_crop": 279,
        "OSBS_029": 61,
        "SOAP_061": 37,
    }
    assert [len(load(f"{split}_full")["annotations"]) for split in ("train", "val", "test")] == [574, 279, 98]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_tiles_agree_with_the_whole_images(split: str) -> None:
    whole = {key: value[0][0] for key, value in by_source(load(f"{split}_full")).items()}
    tiled = by_source(load(split))
    assert tiled.keys() == whole.keys(), "each tree shows in some tile"
    for key, parts in tiled.items():
        x0, y0, x1, y1 = whole[key]
        assert all(x0 <= a < c <= x1 and y0 <= b < d <= y1 for (a, b, c, d), _ in parts)
        counted = [box for box, ignored in parts if not ignored]
        assert len(counted) == 1 if split != "train" else len(counted) >= 1
        a, b, c, d = counted[0]
        assert (c - a) * (d - b) >= 0.4 * (x1 - x0) * (y1 - y0)


@pytest.mark.parametrize("name", ["train", "val", "test", "train_full", "val_full", "test_full"])
def test_passes_our_own_checks(name: str) -> None:
    folder = "full" if name.endswith("_full") else name
    path = ROOT / "annotations" / f"{name}.json"
    assert check_annotation_file(path, classes=("tree",), image_root=ROOT / folder) == []


def test_a_second_run_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = json.loads((ROOT / "prepared.json").read_text())["request"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    settings = {key: stamp[key] for key in ("tile_size", "train_stride", "min_visible")}
    assert prepare(ROOT, **settings).reused
