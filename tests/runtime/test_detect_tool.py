"""`tools/detect.py` as a command: files, exit codes, bad input, full disks; no torch anywhere."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from castling_det.files import sha256_of
from castling_det.runtime.detections import Detections
from castling_det.runtime.detector import Detector
from castling_det.runtime.draw import draw_detections
from castling_det.runtime.run import detect_source
from castling_det.runtime.sources import ImageFiles, UnreadableImage, open_source
from tests.runtime.conftest import REAL, ROOT, needs_data, photo, spot_model

TOOL = ROOT / "tools" / "detect.py"
main = runpy.run_path(str(TOOL), run_name="detect")["main"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), photo(spot=(10 + index, 30), seed=index))
    return folder


@pytest.fixture
def detect(model, tmp_path, capfd):
    def run(source, *options):
        code = main([str(model), str(source), "--out", str(tmp_path / "out"), *map(str, options)])
        return code, capfd.readouterr().err

    return run


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_boxes_are_drawn_from_a_score_on_and_all_are_written(model, photos, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Detector, "draw", lambda _, image, found: drawn.append(len(found)) or image)
    for threshold, boxes in (("0", 1), ("1", 0)):
        assert main([str(model), str(photos), "--out", str(tmp_path / "out"), "--draw-thr", threshold]) == 0
        assert drawn[-3:] == [boxes] * 3
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3


def test_a_detector_that_comes_with_the_package(model, photos, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(model, weights / "scores-nano.onnx")
    (weights / "scores-nano.json").write_text(json.dumps({"sha256": sha256_of(model)}))
    monkeypatch.setattr("castling_det.runtime.detector.WEIGHTS", weights)
    assert main([str(photos), "--out", str(tmp_path / "out")]) == 0
    found = Detector("scores-nano")(photos / "0.png")
    assert str(found).startswith(f"1 detections\n{found.names[0]} {found.scores[0]:.2f} at ")
    with pytest.raises(ValueError, match=r"model scores: no such file, and no detector of ours; .* or scores-nano"):
        Detector("scores")
    (weights / "scores-nano.json").write_text(json.dumps({"sha256": "0"}))
    with pytest.raises(ValueError, match=r"another file than its card scores-nano\.json describes; reinstall"):
        Detector("scores-nano")
    with pytest.raises(SystemExit):
        main(["a", "b", "c"])
    assert "put a glob in quotes" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_written(detect, photos, tmp_path):
    os.rename(photos / "1.png", os.fsencode(photos) + b"/b\xff.png")
    code, _ = detect(photos)
    names = [image["file_name"] for image in json.loads((tmp_path / "out" / "images.json").read_text())["images"]]
    assert code == 0 and list(map(os.fsencode, names)) == [b"0.png", b"2.png", b"b\xff.png"]
    assert os.path.exists(os.fsencode(tmp_path) + b"/out/pictures/b\xff.png")


def test_a_folder(detect, photos, tmp_path):
    code, _ = detect(photos, "--batch-size", 2)
    out = tmp_path / "out"
    assert code == 0
    assert files(out) == ["images.json", *(f"pictures/{i}.png" for i in range(3)), "predictions.json"]
    results = COCO(str(out / "images.json")).loadRes(str(out / "predictions.json"))
    assert [image["file_name"] for image in results.dataset["images"]] == ["0.png", "1.png", "2.png"]
    entries = results.dataset["annotations"]
    assert [entry["image_id"] for entry in entries] == [1, 2, 3] and {entry["category_id"] for entry in entries} == {2}
    for index, entry in enumerate(entries):
        x, y, width, height = entry["bbox"]
        assert (x + width / 2, y + height / 2) == pytest.approx((30, 10 + index), abs=1.6)
    picture, image = cv2.imread(str(out / "pictures" / "0.png")), cv2.imread(str(photos / "0.png"))
    assert picture.shape == image.shape and (picture != image).any()


def test_ids_of_an_existing_coco_file(detect, photos, tmp_path):
    known = {
        "images": [{"id": 70 + i, "file_name": f"somewhere/{i}.png"} for i in range(3)],
        "categories": [{"id": 5, "name": "spot"}, {"id": 6, "name": "leaf"}],
    }
    (tmp_path / "ann.json").write_text(json.dumps(known))
    assert detect(photos, "--ann", tmp_path / "ann.json", "--no-draw")[0] == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in entries] == [(70, 5), (71, 5), (72, 5)]
    assert files(tmp_path / "out") == ["images.json", "predictions.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [], "categories": [{"id": 1, "name": "spot"}]}', "no category leaf, which the detector knows"),
        ('{"images": [], "categories": [{"id": 1, "name": "spot"}, {"id": 2, "name": "leaf"}]}', "no image of this"),
        ("[1]", "not a readable COCO file"),
    ],
)
def test_annotations_that_do_not_fit(detect, photos, tmp_path, content, message):
    (tmp_path / "ann.json").write_text(content)
    code, said = detect(photos, "--ann", tmp_path / "ann.json")
    assert code == 1 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_unreadable_images_are_skipped_and_counted(detect, photos, tmp_path):
    (photos / "1.png").write_bytes(b"damaged")
    (photos / "3.png").touch()
    (photos / "4\n\x1b[2J.gif").symlink_to("gone")
    code, said = detect(photos, "--batch-size", 3)
    assert code == 13
    lines = said.splitlines()
    assert len(lines) == 3 and all(line.startswith("skipped: ") for line in lines)
    assert "1.png: not an image that OpenCV reads" in lines[0] and "3.png" in lines[1] and r"4\n\x1b[2J.gif" in lines[2]
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["image_id"] for entry in entries] == [1, 2]


def test_nothing_is_written_when_every_image_is_over_the_limit(detect, photos, tmp_path):
    code, said = detect(photos, "--max-pixels", 3000)
    assert code == 13 and said.count("skipped: ") == 3 and not (tmp_path / "out").exists()
    assert "48 x 64 pixels: expected at least one and at most 3,000 in all" in said


@pytest.mark.parametrize(("which", "source"), [("spot", "nowhere"), ("none", "photos")])
def test_one_line_for_a_source_or_model_that_is_not_there(model, photos, tmp_path, capfd, which, source):
    given = [str(model.with_name(f"{which}.onnx")), str(tmp_path / source)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert said.startswith("detect: ") and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def clip(tmp_path):
    """A small real video where the tree-crown tiles are prepared, else noise."""
    tiles = sorted((REAL / "val").glob("*.png"))[:5]
    images = [cv2.imread(str(tile)) for tile in tiles] or [photo((256, 256), seed=i) for i in range(5)]
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (256, 256))
    for image in images:
        writer.write(image)
    writer.release()
    return tmp_path / "clip.mp4"


def test_a_video(detect, clip, tmp_path):
    pytest.importorskip("supervision")
    code, _ = detect(clip, "--batch-size", 2)
    assert code == 0 and files(tmp_path / "out") == ["clip_detections.mp4", "images.json", "predictions.json"]
    drawn = open_source(str(tmp_path / "out" / "clip_detections.mp4"))
    pictures = [frame.image for frame in drawn]
    assert len(pictures) == 5 and drawn.info.fps == 5.0
    plain = [frame.image for frame in open_source(str(clip))]
    assert np.abs(pictures[0].astype(int) - plain[0]).max() > 60, "a box is on it"
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [f"clip.mp4#{n:06d}" for n in range(1, 6)]


def test_a_video_without_readable_frames_leaves_nothing(detect, clip, tmp_path):
    pytest.importorskip("supervision")
    code, said = detect(clip, "--max-pixels", 100)
    assert code == 1 and "no frame of it can be read; nothing is written" in said and files(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["pictures", "link to a source", "hard link", "link as a source", "annotations"])
def test_outputs_never_replace_inputs(model, tmp_path, capfd, monkeypatch, kind):
    """An output that has the name of a source, or of a file that is one under another name, is refused at once."""
    out, source = tmp_path / "album", tmp_path / "photos"
    pictures = out / "pictures"
    pictures.mkdir(parents=True)
    source.mkdir()
    options = []
    if kind == "pictures":
        source = pictures
    cv2.imwrite(str(source / "0.png"), photo())
    if kind == "link to a source":
        (pictures / "0.png").symlink_to(source / "0.png")
    elif kind == "hard link":
        os.link(source / "0.png", pictures / "0.png")
    elif kind == "link as a source":
        (source / "0.png").rename(tmp_path / "original.png")
        (source / "0.png").symlink_to(tmp_path / "original.png")
        pictures.rmdir()
        pictures.symlink_to(source)
    elif kind == "annotations":
        (out / "images.json").write_text('{"images": [], "categories": []}')
        options = ["--ann", str(out / "images.json")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    assert main([str(model), str(source), "--out", str(out), *options]) == 1
    said = capfd.readouterr().err
    assert "would replace the input" in said and "give another folder" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_names_of_the_greatest_length(detect, tmp_path):
    """249 bytes, of ASCII and of letters of two bytes each; the limit of file systems is 255."""
    folder = tmp_path / "long"
    folder.mkdir()
    for name in ("a" * 245 + ".png", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 122 + "b.png"):
        done, content = cv2.imencode(".png", photo())
        assert done and len(name.encode()) == 249
        (folder / name).write_bytes(content.tobytes())
    code, said = detect(folder)
    assert (code, said) == (0, "") and len(files(tmp_path / "out" / "pictures")) == 2


def test_an_image_that_cannot_be_prepared_costs_no_other(photos, tmp_path, capfd):
    """As the PyTorch detector, whose resize leaves nothing of 1 x 900 pixels."""

    class Picky:
        classes = ("spot",)

        def detect(self, images):
            if any(min(image.shape[:2]) == 1 for image in images):
                raise UnreadableImage("1 x 900 pixels: cannot be prepared")
            one = np.ones(1)
            return [Detections(np.array([[1.0, 1, 9, 9]]), one, one.astype(int) * 0, self.classes) for _ in images]

    cv2.imwrite(str(photos / "1.png"), np.zeros((1, 900, 3), np.uint8))
    detector = Detector(spot_model(tmp_path / "x.onnx"), batch_size=3)
    detector.backend, detector.classes = Picky(), Picky.classes
    outcome = detect_source(detector, open_source(str(photos)), tmp_path / "out")
    assert (outcome.images, outcome.skipped, outcome.exit_code) == (2, 1, 11)
    assert capfd.readouterr().err == "skipped: 1.png: 1 x 900 pixels: cannot be prepared\n"
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 2


def test_ctrl_c_in_a_folder_leaves_no_predictions(detect, photos, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(ImageFiles, "__iter__", interrupted)
    code, said = detect(photos)
    assert code == 130 and said == "detect: interrupted\n" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["predictions.json", "pictures/0.png"])
def test_a_full_disk_leaves_no_part(detect, photos, tmp_path, monkeypatch, what):
    """The system's answer to a write on a full disk, at one file."""
    name, fsync = what.rpartition("/")[2], os.fsync

    def full(handle):
        if f".{name}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    code, said = detect(photos)
    assert code == 1 and "No space left on device" in said and said.count("\n") == 1
    left = files(tmp_path / "out")
    assert name not in [path.rpartition("/")[2] for path in left] and not [path for path in left if ".part" in path]
    assert "predictions.json" not in left and "images.json" not in left


@needs_data
def test_without_torch_or_mmdetection(model, tmp_path):
    """As on a machine that has neither: whatever asks for them fails."""
    tile = next((REAL / "val").glob("*.png"))
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'torchvision', 'mmdet', 'mmengine', 'mmcv', 'timm', 'rich',\n"
        "                                      'matplotlib', 'PIL', 'safetensors', 'sahi', 'scipy', 'supervision'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import runpy, castling_det\n"
        f"main = runpy.run_path({str(TOOL)!r}, run_name='detect')['main']\n"
        f"code = main([{str(model)!r}, {str(tile)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        f"assert len(castling_det.Detector({str(model)!r})({str(tile)!r})) == 1\n"
        f"assert main([{str(model)!r}, {str(tile)!r}, '--tile', '64']) == 1\n"
        "open('deploy.pth', 'w').close()\n"
        f"assert main(['deploy.pth', {str(tile)!r}, '--config', 'c.py']) == 1\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == ["images.json", f"pictures/{tile.name}", "predictions.json"]
    assert "tile: needs SAHI" in done.stderr and "pip install 'castling-det[sahi]'" in done.stderr
    assert "deploy.pth: a checkpoint needs PyTorch and MMDetection" in done.stderr


def test_small_boxes_are_drawn_without_text():
    """A box of a notehead's size has its outline alone; a large one its name and score too."""
    page = np.zeros((200, 300, 3), np.uint8)
    boxes = np.float32([[20, 100, 32, 110], [120, 60, 280, 190]])
    for index, text in ((0, False), (1, True)):
        one = Detections(boxes[index : index + 1], np.float32([0.9]), np.int64([0]), ("noteheadBlack",))
        x1, y1, x2, y2 = boxes[index].astype(int)
        drawn = draw_detections(page, one)
        assert drawn[y1 : y2 + 1, x1 : x2 + 1].any()
        drawn[y1 - 1 : y2 + 2, x1 - 1 : x2 + 2] = 0
        assert drawn.any() == text
