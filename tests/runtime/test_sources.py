"""What a source is, and how it says which images cannot be read."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from castling_det.runtime.sources import UnreadableImage, open_source, read_image
from tests.runtime.conftest import FORMATS, photo


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
    (frame,) = open_source(str(folder / "b.png"))
    np.testing.assert_array_equal(frame.image, photo(seed=0))


def test_whatever_is_named_like_an_image_is_counted(tmp_path):
    """None of these is opened: a pipe without a writer would wait for ever."""
    cv2.imwrite(str(tmp_path / "good.png"), photo())
    (tmp_path / "linked.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("anim.gif", "photo.AVIF", "photo.heic"):
        Image.fromarray(photo()).save(tmp_path / name, format="GIF")
    for source in (tmp_path, tmp_path / "*"):
        frames = {frame.name: frame for frame in open_source(str(source))}
        assert sorted(name for name, frame in frames.items() if frame.image is not None) == ["good.png", "linked.png"]
        bad = {name: frame.problem for name, frame in frames.items() if frame.missing == 1}
        assert set(bad) == {
            "dangling.png", "loop.png", "device.png", "folder.png", "pipe.png", "anim.gif", "photo.AVIF", "photo.heic"
        }  # fmt: skip
        assert "not a file" in bad["pipe.png"] and "convert it to PNG" in bad["anim.gif"]


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
        open_source(str(tmp_path / source))


def test_files_that_are_missing_or_too_large(tmp_path):
    with pytest.raises(UnreadableImage, match=r"missing.png: cannot be read"):
        read_image(tmp_path / "missing.png")
    whole = tmp_path / "whole.png"
    cv2.imwrite(str(whole), photo())
    with pytest.raises(UnreadableImage, match=r"48 x 64 pixels: expected at least one and at most 3,071 in all"):
        read_image(whole, max_pixels=48 * 64 - 1)
    assert read_image(whole, max_pixels=48 * 64).shape == (48, 64, 3)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UnreadableImage, match=r"1,000,000,000,000 bytes: more than an image"):
        read_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_too_many_pixels_are_refused_before_decoding(tmp_path, options, monkeypatch):
    """By the header alone."""
    Image.fromarray(photo((70, 130))).save(tmp_path / "photo.png", **options)
    assert read_image(tmp_path / "photo.png", max_pixels=70 * 130).shape == (70, 130, 3)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"70 x 130 pixels: expected at least one and at most 9,099"):
        read_image(tmp_path / "photo.png", max_pixels=70 * 130 - 1)


def saved(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def disguised(kind):
    """70 x 130 pixels for their decoder, and fewer or none for a careless reader of the header."""
    match kind:
        case "JPEG, fill bytes before a marker":
            content = saved(photo((70, 130)), format="JPEG")
            return content[:2] + b"\xff\xff\xff\xfe\0\x04ab" + content[2:]
        case "BMP, header of 12 + 256 bytes":
            content = saved(photo((70, 130)), format="BMP")
            return content[:10] + struct.pack("<II", 54 + 228, 12 + 256) + content[18:54] + bytes(228) + content[54:]
        case "TIFF, width given twice":
            content = saved(photo((70, 130)), format="TIFF")
            planar, again = struct.pack("<HHIHH", 284, 3, 1, 1, 0), struct.pack("<HHII", 256, 4, 1, 1)
            assert content.count(planar) == 1
            return content.replace(planar, again)


@pytest.mark.parametrize(
    "kind", ["JPEG, fill bytes before a marker", "BMP, header of 12 + 256 bytes", "TIFF, width given twice"]
)
def test_a_size_is_read_as_the_decoder_reads_it(tmp_path, kind, monkeypatch):
    (tmp_path / "photo.png").write_bytes(disguised(kind))
    assert read_image(tmp_path / "photo.png", max_pixels=70 * 130).shape == (70, 130, 3)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=r"70 x 130 pixels"):
        read_image(tmp_path / "photo.png", max_pixels=70 * 130 - 1)


def tiled_tiff(side):
    """10 x 10 pixels in one tile of `side` x `side`."""
    tags = [(256, 10), (257, 10), (258, 8), (259, 1), (262, 1), (277, 1), (322, side), (323, side), (324, 8), (325, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(photo(), format="PPM"), "no BMP, JPEG, PNG, TIFF or WebP file"),
        (saved(photo(), format="GIF"), "no BMP, JPEG, PNG, TIFF or WebP file"),
        (b"RIFF\xff\0\0\0WEBPVP8?" + bytes(99), "no size in its header"),
        (b"\xff\xd8\xff\xd0" + bytes(99), "no size in its header"),
        (b"MM\0*\x7f\xff\xff\xff" + bytes(99), "no size in its header"),
        (saved(photo()[..., 0].astype(np.float32), format="TIFF"), "32 bits a channel"),
        (saved(photo(), format="PNG", save_all=True, append_images=[Image.fromarray(photo(seed=1))]), "an animation"),
        (saved(photo(), format="PNG").replace(b"IDAT", b"IDAT" * 2, 1), "no size in its header"),
        (saved(photo(), format="JPEG") + b"\xff\xda" * 100, "more than 100 scans"),
        (tiled_tiff(20_000), "20000 x 20000 pixels"),
    ],
    ids=["PPM", "GIF", "WebP", "JPEG", "TIFF", "32 bits", "APNG", "PNG chunk", "scans", "tile"],
)
def test_what_a_decoder_may_not_be_given(tmp_path, content, message, monkeypatch):
    (tmp_path / "photo.png").write_bytes(content)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match=message):
        read_image(tmp_path / "photo.png")


def test_a_bomb_takes_no_memory(tmp_path):
    """100 kB that would be 4.8 GB of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**8))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"40000 x 40000 pixels"):
        read_image(tmp_path / "bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.fixture
def clip(tmp_path):
    def write(frames=6):
        path = tmp_path / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (96, 64))
        for index in range(frames):
            writer.write(photo((64, 96), None, seed=index))
        writer.release()
        return path

    return write


@pytest.mark.timeout(60)
def test_an_avi_that_claims_a_billion_frames_ends(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (96, 64))
    for _ in range(3):
        writer.write(photo((64, 96), None))
    writer.release()
    content = bytearray((tmp_path / "clip.avi").read_bytes())
    for header, place in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
        at = content.index(header) + place
        assert content[at : at + 4] == (3).to_bytes(4, "little")
        content[at : at + 4] = (10**9).to_bytes(4, "little")
    (tmp_path / "clip.avi").write_bytes(content)
    frames = list(open_source(str(tmp_path / "clip.avi")))
    assert sum(frame.image is not None for frame in frames) == 3 and len(frames) <= 4


def test_a_video_frame_by_frame(clip):
    pytest.importorskip("supervision")
    source = open_source(str(clip()), max_pixels=10_000)
    assert source.total == 6 and source.info.fps == 10.0
    frames = list(source)
    assert [frame.name for frame in frames] == [f"clip.mp4#{number:06d}" for number in range(1, 7)]
    assert all(frame.image.shape == (64, 96, 3) for frame in frames)
    assert len(list(open_source(str(clip()), max_frames=4))) == 4
    small = open_source(str(clip(2)), max_pixels=100)
    assert [(frame.missing, "64 x 96 pixels" in frame.problem) for frame in small] == [(1, True)] * 2


def test_frames_that_the_file_promises_are_counted(clip, monkeypatch):
    supervision = pytest.importorskip("supervision")
    from_path = supervision.VideoInfo.from_video_path

    def boasting(path):
        info = from_path(path)
        info.total_frames, info.fps = 10**9, float("nan")
        return info

    monkeypatch.setattr(supervision.VideoInfo, "from_video_path", boasting)
    source = open_source(str(clip()))
    *frames, last = source
    assert source.info.fps == 25.0 and len(frames) == 6 and all(frame.image is not None for frame in frames)
    assert last.missing == 10**9 - 6 and "clip.mp4: ends after 6 of 1000000000 frames" in last.problem


def test_a_file_that_is_no_video(clip, tmp_path, monkeypatch):
    pytest.importorskip("supervision")
    (tmp_path / "cut.mp4").write_bytes(clip().read_bytes()[:200])
    with pytest.raises(ValueError, match=r"video .*cut.mp4: not a video that OpenCV opens, or damaged"):
        open_source(str(tmp_path / "cut.mp4"))
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ValueError, match=r"needs supervision .*pip install 'castling-det\[video\]'"):
        open_source(str(tmp_path / "cut.mp4"))
