"""Odd and damaged images: what the check says before training, what loader and preparation make of them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from castling_det import check_dataset
from castling_det.runtime.sources import UnreadableImage, read_image
from tests.datasets.converters import tree_crowns
from tests.datasets.test_dataset_checks import sound

SIZE = (100, 80)
VOC = "<annotation><size><width>{}</width><height>{}</height></size></annotation>"


def pixels(width: int = SIZE[0], height: int = SIZE[1]) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def png_header(side: int) -> bytes:
    """A PNG that declares a size and holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def _cut(path: Path, share: float, **options: Any) -> None:
    Image.fromarray(pixels()).save(path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _oriented(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels()).save(path, format="JPEG", quality=95, exif=exif)


def _image(path: Path, mode: str, **options: Any) -> None:
    Image.fromarray(pixels()).convert(mode).save(path, **options)


def _deep(path: Path) -> None:
    Image.fromarray(pixels()[..., 0].astype(np.uint16) * 256 + 7).save(path, format="PNG")


# How the file is made; severity and words of the one problem, or None; whether MMDetection's loader reads it.
DAMAGED = ("error", "are damaged, truncated")
IMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, str] | None, bool]] = {
    "RGB": (lambda p: _image(p, "RGB", format="PNG"), None, True),
    "grayscale": (lambda p: _image(p, "L", format="PNG"), None, True),
    "palette": (lambda p: _image(p, "P", format="PNG"), None, True),
    "with alpha": (lambda p: _image(p, "RGBA", format="PNG"), None, True),
    "CMYK": (lambda p: _image(p, "CMYK", format="JPEG"), ("warning", "are CMYK"), True),
    "16-bit": (_deep, ("warning", "have 16 bits a channel"), True),
    "32-bit float": (
        lambda p: Image.fromarray(pixels()[..., 0].astype(np.float32)).save(p, format="TIFF"),
        ("error", "32 bits a channel"),
        False,
    ),
    "EXIF, turned by 90 degrees": (lambda p: _oriented(p, 6), ("error", "turned by their EXIF orientation"), True),
    "EXIF, turned by 180 degrees": (lambda p: _oriented(p, 3), ("warning", "have an EXIF orientation"), True),
    "truncated JPEG": (lambda p: _cut(p, 0.6, format="JPEG", quality=95), DAMAGED, False),
    "JPEG without its last bytes": (lambda p: _cut(p, 0.99, format="JPEG", quality=95), DAMAGED, False),
    "truncated PNG": (lambda p: _cut(p, 0.6, format="PNG"), DAMAGED, False),
    "cut in its header": (lambda p: _cut(p, 0.001, format="PNG"), DAMAGED, False),
    "empty": (lambda p: p.write_bytes(b""), DAMAGED, False),
    "text": (lambda p: p.write_text("hello"), DAMAGED, False),
    "another size": (lambda p: Image.new("RGB", (64, 64)).save(p, format="PNG"), ("error", "another size"), True),
    "20,000 x 20,000": (lambda p: p.write_bytes(png_header(20_000)), ("error", "more than 178956970"), False),
    "2 ** 31 x 2 ** 31": (lambda p: p.write_bytes(png_header(2**31 - 1)), ("error", "more than 178956970"), False),
}


REFUSED_BY_PREPARATION = {kind for kind, (_, _, loads) in IMAGES.items() if not loads} | {"16-bit"}


def check(tmp_path: Path, make: Callable[[Path], Any], level: Any, size: tuple[int, int] = SIZE) -> list[Any]:
    data = sound(images=1, boxes=1)
    data["images"] = [{**data["images"][0], "width": size[0], "height": size[1]}]
    data["annotations"][0].update(bbox=[0, 0, 1, 1], area=1)
    (tmp_path / "train.json").write_text(json.dumps(data))
    make(tmp_path / "1.png")
    return check_dataset(tmp_path / "train.json", image_root=tmp_path, level=level)


@pytest.mark.parametrize("kind", IMAGES)
def test_the_check_names_the_image_and_what_becomes_of_it(tmp_path: Path, kind: str) -> None:
    make, expected, _ = IMAGES[kind]
    found = check(tmp_path, make, "pixels")
    if expected is None:
        assert found == []
        return
    (problem,) = found
    assert problem.severity == expected[0] and expected[1] in problem.message
    assert "'1.png'" in problem.message and problem.fix


@pytest.mark.parametrize("kind", IMAGES)
def test_the_loader_agrees_with_the_check(tmp_path: Path, kind: str) -> None:
    """What passes the check is loaded as 8-bit colour of the annotated size; what does not load is an error there."""
    make, _, loads = IMAGES[kind]
    make(tmp_path / "1.png")
    if kind.startswith(("20,000", "2 **")):
        with pytest.raises(UnreadableImage, match=r"pixels: expected at least one and at most 100,000,000"):
            read_image(tmp_path / "1.png")
        return
    if not loads:
        with pytest.raises(Exception, match=r"failed to load|imdecode|empty"):
            LoadImageFromFile()({"img_path": str(tmp_path / "1.png")})
        with pytest.raises(UnreadableImage, match=r"1\.png: not an image that OpenCV reads"):
            read_image(tmp_path / "1.png")
        return
    image = LoadImageFromFile()({"img_path": str(tmp_path / "1.png")})["img"]
    assert image.dtype == np.uint8 and image.shape[2] == 3
    np.testing.assert_array_equal(read_image(tmp_path / "1.png"), image)
    if kind in ("RGB", "with alpha"):
        np.testing.assert_array_equal(image[..., ::-1], pixels())
    if kind == "16-bit":
        assert np.abs(image.astype(int) - pixels()[..., :1]).max() <= 1
    if kind == "CMYK":
        assert np.abs(image[..., ::-1].astype(int) - pixels()).mean() < 12
    assert image.shape[:2] == {"EXIF, turned by 90 degrees": (100, 80), "another size": (64, 64)}.get(kind, (80, 100))


def test_headers_alone_find_what_needs_no_decoding(tmp_path: Path) -> None:
    for kind in ("another size", "20,000 x 20,000", "text", "16-bit", "EXIF, turned by 90 degrees"):
        make, expected, _ = IMAGES[kind]
        (problem,) = check(tmp_path, make, "headers")
        assert expected is not None and expected[1] in problem.message
    assert check(tmp_path, IMAGES["truncated JPEG"][0], "headers") == []
    assert check(tmp_path, IMAGES["another size"][0], "names") == []
    (turned,) = check(tmp_path, lambda path: _oriented(path, 6), "headers", size=SIZE[::-1])
    assert turned.severity == "warning", "an image with its turned size"


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    make = lambda path: Image.new("RGB", (1, 1)).save(path, format="PNG")  # noqa: E731
    assert check(tmp_path, make, "pixels", size=(1, 1)) == []
    assert LoadImageFromFile()({"img_path": str(tmp_path / "1.png")})["img"].shape == (1, 1, 3)


@pytest.mark.parametrize("kind", IMAGES)
def test_preparation_takes_eight_bit_images_only(tmp_path: Path, kind: str) -> None:
    make, _, _ = IMAGES[kind]
    make(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    voc = VOC.format(*((64, 64) if kind == "another size" else SIZE)).encode()
    if kind in REFUSED_BY_PREPARATION:
        with pytest.raises(ValueError, match=r"^photo: (not a readable image|pixel format)"):
            tree_crowns.load_source("photo", content, voc)
    else:
        assert tree_crowns.load_source("photo", content, voc).pixels.mode == "RGB"
