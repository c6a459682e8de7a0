"""The runtime's pixels against MMDetection's own test pipeline: bit for bit, on real tiles and odd sizes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS  # noqa: F401  # fills the registry
from mmengine.registry import init_default_scope

from castling_det.runtime import preprocess
from castling_det.runtime.preprocess import Prepared, Step, equalize, prepare
from castling_det.runtime.sources import read_image
from tests.runtime.conftest import REAL, needs_data

EQUALIZE = {"type": "Equalize"}


def resize(height, width, keep_ratio=True, interpolation="bilinear"):
    return {"type": "Resize", "scale": [height, width], "keep_ratio": keep_ratio, "interpolation": interpolation}


def mmdet_pipeline(steps, load="LoadImageFromNDArray"):
    """The transforms of a config that the metadata's steps stand for."""
    init_default_scope("mmdet")
    transforms = [dict(type=load)]
    for step in steps:
        options = dict(step)
        if options["type"] == "Equalize":
            options["prob"] = 1.0
        else:
            key = "scale" if options["type"] == "Resize" else "size"
            options[key] = tuple(reversed(options[key]))
            if "pad_values" in options:
                options["pad_val"] = dict(img=tuple(options.pop("pad_values")))
        transforms.append(options)
    return Compose(transforms)


PIPELINES = [
    [EQUALIZE, resize(192, 192)],
    [resize(64, 97)],
    [resize(97, 64, keep_ratio=False), EQUALIZE],
    [resize(320, 320, interpolation="bicubic")],
    [resize(100, 60), {"type": "Pad", "size": [128, 128], "pad_values": [114, 104, 94]}],
]


@pytest.mark.parametrize("steps", PIPELINES, ids=str)
@pytest.mark.parametrize("hw", [(256, 256), (61, 203), (1, 7), (300, 33)], ids=str)
def test_pixels_equal_mmdetections(steps, hw):
    generator = np.random.default_rng(hw[0])
    image = (generator.integers(0, 256, (*hw, 3)) * generator.random(3)).astype(np.uint8)
    expected = mmdet_pipeline(steps)({"img": image})
    actual = prepare(image, msgspec.convert(steps, list[Step]))
    np.testing.assert_array_equal(actual.pixels, expected["img"], strict=True)
    # mmdet's scale factor is (x, y); the content is what there is before a Pad.
    ratio = (actual.content_hw[1] / hw[1], actual.content_hw[0] / hw[0])
    assert ratio == pytest.approx(expected["scale_factor"], rel=1e-12)
    assert actual.original_hw == hw


@needs_data
def test_real_tiles_equal_mmdetections():
    files = sorted((REAL / "val").glob("*.png"))[:8]
    steps = PIPELINES[0]
    pipeline = mmdet_pipeline(steps, load="LoadImageFromFile")
    for file in files:
        expected = pipeline({"img_path": str(file)})["img"]
        np.testing.assert_array_equal(
            prepare(read_image(file), msgspec.convert(steps, list[Step])).pixels, expected, strict=True
        )
    assert len(files) == 8


@needs_data
def test_the_check_sees_another_rounding(monkeypatch):
    """Negative control: histogram equalisation as OpenCV has it differs by a step here and there."""
    import cv2

    def opencv(image):
        return np.stack([cv2.equalizeHist(np.ascontiguousarray(image[:, :, c])) for c in range(3)], axis=-1)

    monkeypatch.setattr(preprocess, "equalize", opencv)
    with pytest.raises(AssertionError):
        test_real_tiles_equal_mmdetections()


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_plain_channel_stays(value):
    image = np.full((9, 5, 3), value, dtype=np.uint8)
    np.testing.assert_array_equal(equalize(image), image)


def test_boxes_go_back_without_the_padding():
    prepared = Prepared(np.zeros((64, 64, 3), np.uint8), content_hw=(32, 64), original_hw=(100, 400))
    boxes = np.array([[8, 4, 16, 8], [-5, 10, 70, 60]], dtype=np.float32)
    expected = [[50, 12.5, 100, 25], [0, 31.25, 400, 100]]
    np.testing.assert_allclose(prepared.to_original(boxes), expected, rtol=1e-6)
