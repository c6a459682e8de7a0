"""What a source is, and how what cannot be read is said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from castling_det.runtime.run import open_source
from castling_det.runtime.sources import UnreadableImage, find_images, read_image
from castling_det.runtime.video import Video, VideoFile
from tests.runtime.conftest import photo


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(("b.png", "a.JPG", "below/c.bmp")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), photo(seed=index))
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def names(source):
    return [frame.name for frame in open_source(str(source), max_pixels=10_000)]


def test_folder_glob_and_file(folder):
    assert names(folder) == ["a.JPG", "b.png"]
    assert names(folder / "b.png") == ["b.png"]
    assert names(folder / "*.png") == ["b.png"]
    assert names(folder / "**" / "*") == ["a.JPG", "b.png", "below/c.bmp"], "paths below what they share"


def test_pixels_are_the_files(folder):
    (frame,) = open_source(str(folder / "b.png"), max_pixels=10_000)
    np.testing.assert_array_equal(frame.image, photo(seed=0))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)], ids=["gray", "alpha"])
def test_files_of_other_channels_become_three(tmp_path, shape):
    cv2.imwrite(str(tmp_path / "x.png"), np.full(shape, 9, np.uint8))
    assert read_image(tmp_path / "x.png").shape == (6, 5, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", r"none: no such file or folder; give an image, a folder, a glob in quotes"),
        ("*.gif", r"\*.gif: no image matches"),
        ("empty", r"empty: no image in this folder \(expected .jpg"),
    ],
)
def test_sources_without_images(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_images(str(tmp_path / source))


def test_files_that_are_no_images(tmp_path):
    whole = tmp_path / "whole.png"
    cv2.imwrite(str(whole), photo())
    broken = {"empty.png": b"", "text.png": b"hello", "cut.png": whole.read_bytes()[:40], "missing.png": None}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match=rf"{name}: (not an image that OpenCV reads|cannot be read)"):
            read_image(tmp_path / name)
    with pytest.raises(UnreadableImage, match=r"48 x 64 pixels: expected at least one and at most 3,071 in all"):
        read_image(whole, max_pixels=48 * 64 - 1)
    assert read_image(whole, max_pixels=48 * 64).shape == (48, 64, 3)


def test_a_missing_camera():
    with pytest.raises(ValueError, match=r"camera 97: cannot be opened; check that it is connected"):
        open_source("97", max_pixels=1)


def write_video(path, frames=6):
    with VideoFile(path, 10.0) as video:
        for index in range(frames):
            video.add(photo((64, 96), None, seed=index))
    return path


def test_a_video_frame_by_frame(tmp_path):
    source = open_source(str(write_video(tmp_path / "clip.mp4")), max_pixels=10_000)
    assert source.total == 6 and source.fps == 10.0
    frames = list(source)
    assert [frame.name for frame in frames] == [f"clip.mp4#{number:06d}" for number in range(1, 7)]
    assert all(frame.image.shape == (64, 96, 3) for frame in frames)
    assert len(list(Video(str(tmp_path / "clip.mp4"), max_frames=4))) == 4


def test_frames_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    """Of nine frames the second, the third and the last two fail to decode."""
    source = open_source(str(write_video(tmp_path / "clip.mp4", 9)), max_pixels=10_000)
    read, calls = source._capture.read, iter(range(1, 100))

    class Flaky:
        def read(self):
            result = read()
            return (False, None) if next(calls) in (2, 3, 8, 9) else result

        def release(self):
            self.released = True

    source._capture = Flaky()
    frames = list(source)
    assert [(frame.missing, frame.image is None) for frame in frames] == [
        (0, False), (2, True), (0, False), (0, False), (0, False), (0, False), (2, True),
    ]  # fmt: skip
    problems = [frame.problem for frame in frames if frame.problem]
    assert problems[0].startswith("clip.mp4: frames 2 to 3 of 9 cannot be read") and "8 to 9 of 9" in problems[1]
    assert source._capture.released


def test_a_file_that_is_no_video(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(write_video(tmp_path / "whole.mp4").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"video .*clip.mp4: not a video that OpenCV opens, or damaged"):
        open_source(str(tmp_path / "clip.mp4"), max_pixels=1)


def test_frames_over_the_limit_are_said(tmp_path):
    source = Video(str(write_video(tmp_path / "clip.mp4", 2)), max_pixels=100)
    assert [(frame.missing, "64 x 96 pixels" in frame.problem) for frame in source] == [(1, True)] * 2


def test_a_video_that_fails_leaves_nothing(tmp_path):
    class Stop(Exception):
        pass

    with pytest.raises(Stop), VideoFile(tmp_path / "new.mp4", 10.0) as video:
        video.add(photo())
        raise Stop
    assert list(tmp_path.iterdir()) == []
