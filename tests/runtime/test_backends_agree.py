"""One detector as a checkpoint and as an ONNX file finds the same in the same images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config

from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.export.onnx import export_onnx
from castling_det.runtime.detector import Detector
from castling_det.runtime.sources import UnreadableImage
from tests.conversion.conftest import _TINY, randomised_state
from tests.runtime.conftest import photo


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Config, checkpoint and ONNX file of a detector with random parameters, whose test pipeline equalises."""
    folder = tmp_path_factory.mktemp("agree")
    config = with_attention(Config(copy.deepcopy(_TINY)), "linear")
    # Different for each channel, so that a swap would show; fewer boxes, so that scores differ clearly.
    config.model.data_preprocessor.update(mean=[123.0, 110.0, 90.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=True)
    config.test_dataloader.dataset.pipeline.insert(1, dict(type="Equalize", prob=1.0))
    model = build_detector(config)
    state = randomised_state(model, seed=3)
    meta = {
        "cfg": config.pretty_text,
        "dataset_meta": {"classes": ("tree", "shrub"), "palette": [(9, 9, 9), (0, 99, 0)]},
    }
    torch.save({"meta": meta, "state_dict": state}, folder / "model.pth")
    config.dump(folder / "config.py")
    export_onnx(folder / "config.py", folder / "model.pth", folder / "model.onnx")
    return folder / "config.py", folder / "model.pth", folder / "model.onnx"


@pytest.fixture(scope="module")
def detectors(files):
    config, checkpoint, onnx = files
    return Detector(checkpoint, config, batch_size=2), Detector(onnx, batch_size=2)


# At 64 pixels the first five are multiples of 16 a side, the others are padded; one is narrower than a pixel there.
SIZES = [(48, 64), (64, 32), (256, 256), (99, 199), (400, 100), (100, 70), (64, 31), (33, 200), (41, 64), (64, 57)]
IMAGES = [photo(hw, None, seed=i) for i, hw in enumerate(SIZES)]


def agree(ours, theirs, tolerance):
    """Each box has a partner of its label and score; equal scores may stand in any order."""
    assert len(ours) == len(theirs) > 0 and ours.classes == theirs.classes
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)
    distance = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(axis=-1)
    distance += 1e3 * (ours.labels[:, None] != theirs.labels[None])
    distance += 1e3 * (np.abs(ours.scores[:, None] - theirs.scores[None]) > 1e-5)
    assert distance.min(axis=0).max() < tolerance and distance.min(axis=1).max() < tolerance


def test_onnx_and_pytorch_find_the_same(detectors):
    """With random parameters nearly every box reaches the border, and padding would have boxes of its own."""
    torch_detector, onnx_detector = detectors
    for image, ours, theirs in zip(IMAGES, onnx_detector.detect(IMAGES), torch_detector.detect(IMAGES), strict=True):
        agree(ours, theirs, tolerance=1e-3 * max(image.shape))
        assert (ours.boxes <= np.tile(image.shape[1::-1], 2)).all() and (ours.boxes[:, 2:] > ours.boxes[:, :2]).all()


def test_a_file_without_the_input_of_sizes_still_runs(files, detectors, tmp_path):
    """Earlier versions wrote none: what lies outside of the image is dropped after suppression only."""
    import onnx

    model = onnx.load(files[2])
    del model.graph.input[1]
    onnx.save(model, tmp_path / "old.onnx")
    old = Detector(tmp_path / "old.onnx")
    agree(old(IMAGES[0]), detectors[1](IMAGES[0]), tolerance=1e-6)
    found = old(IMAGES[5])
    assert len(found) and (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_an_image_that_the_config_cannot_prepare_is_named(detectors):
    torch_detector, onnx_detector = detectors
    narrow = np.zeros((1, 900, 3), np.uint8)
    with pytest.raises(UnreadableImage, match=r"1 x 900 pixels: the config's test pipeline cannot prepare it"):
        torch_detector.detect([IMAGES[0], narrow])
    assert len(onnx_detector.detect([IMAGES[0], narrow])) == 2


def test_the_comparison_sees_a_swapped_channel(detectors):
    torch_detector, onnx_detector = detectors
    with pytest.raises(AssertionError):
        agree(onnx_detector(IMAGES[0][:, :, ::-1]), torch_detector(IMAGES[0]), tolerance=1.0)


def test_mmdetections_own_inference_agrees(files, detectors):
    """`inference_detector` of MMDetection, image by image, with the model and pipeline as it builds them."""
    from mmdet.apis import inference_detector

    backend = detectors[0].backend
    model = backend.model
    model.cfg = backend.config
    for image, ours in zip(IMAGES, backend.detect(IMAGES), strict=True):
        expected = inference_detector(model, image).pred_instances
        np.testing.assert_array_equal(ours.boxes, expected.bboxes.numpy())
        np.testing.assert_array_equal(ours.scores, expected.scores.numpy())
        np.testing.assert_array_equal(ours.labels, expected.labels.numpy())


def test_drawn_by_mmdetections_visualizer(detectors):
    from castling_det.runtime.draw import draw_detections

    detector, image = detectors[0], IMAGES[3]
    found = detector(image)
    picture = detector.draw(image, found)
    assert picture.shape == image.shape and picture.dtype == np.uint8 and (picture != image).any()
    assert (picture != draw_detections(image, found)).any(), "not the plain drawing"
    nothing = found.above(1.1)
    np.testing.assert_array_equal(detector.draw(image, nothing), image)


def test_a_device_or_config_that_is_not_there_is_named(files, tmp_path):
    config, checkpoint, _ = files
    with pytest.raises(ValueError, match=r"none.py: no such file"):
        Detector(checkpoint, tmp_path / "none.py")
    with pytest.raises(ValueError, match=r"device='abacus'"):
        Detector(checkpoint, config, device="abacus")
