"""Images larger than the network's input, tile by tile."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sahi")

from castling_det.runtime.detections import Detections
from castling_det.runtime.detector import Detector
from castling_det.runtime.sources import read_image
from castling_det.runtime.tiled import detect_tiled
from tests.runtime.conftest import FULL, REAL, needs_data, photo, spot_model


class Squares:
    """Finds every white square in what it is shown, whole or cut, by its bounding box."""

    classes = ("square",)

    def __init__(self):
        self.batches = []

    def detect(self, images):
        import cv2

        self.batches.append([image.shape[:2] for image in images])
        found = []
        for image in images:
            count, _, stats, _ = cv2.connectedComponentsWithStats((image[:, :, 0] > 250).astype(np.uint8))
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:]], np.float32).reshape(-1, 4)
            scores = np.array([area / 1000 for *_, area in stats[1:]], np.float32)  # a cut one has a lower score
            found.append(Detections(boxes, scores, np.zeros(count - 1, np.int64), self.classes))
        return found


@needs_data
def test_sahi_itself_finds_the_same(model):
    """`get_sliced_prediction` of SAHI, with a model of its own kind around the same detector."""
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction

    class Model(DetectionModel):
        def set_model(self, model, **_):
            self.model, self.category_mapping = model, {"0": "leaf", "1": "spot"}

        def perform_inference(self, image):
            self.found = self.model.detect([image])[0]

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list=None, full_shape_list=None
        ):
            shift, rows = shift_amount_list[0], zip(self.found.boxes.tolist(), self.found.scores.tolist(), strict=True)
            one = [ObjectPrediction(bbox=box, category_id=1, score=score, shift_amount=shift) for box, score in rows]
            self._object_prediction_list_per_image = [one]

    backend, image = Detector(model).backend, read_image(FULL)[:400, :500]
    expected = get_sliced_prediction(
        image, Model(model=backend, confidence_threshold=0.0, device="cpu"), slice_height=96, slice_width=96,
        overlap_height_ratio=0.3, overlap_width_ratio=0.3, perform_standard_pred=False, postprocess_type="NMS",
        postprocess_match_metric="IOS", postprocess_match_threshold=0.5, force_postprocess_type=True, verbose=0,
    ).object_prediction_list  # fmt: skip
    found = detect_tiled(backend, image, tile=96, overlap=0.3)
    assert len(found) == len(expected) > 20
    boxes = np.array([one.bbox.to_xyxy() for one in expected])
    np.testing.assert_allclose(np.sort(found.boxes, axis=0), np.sort(boxes, axis=0), atol=1e-3)


@needs_data
def test_the_real_image_gets_every_square_once_and_whole():
    """1249 x 1035 pixels, tiles of 256: squares in the middle of tiles, on their borders, in the image's corners."""
    image = np.minimum(read_image(FULL), 250)
    assert image.shape == (1035, 1249, 3)
    corners = [(0, 0), (1225, 0), (0, 1011), (1225, 1011), (245, 300), (244, 500), (600, 190), (410, 410), (830, 700)]
    for x, y in corners:
        image[y : y + 24, x : x + 24] = 255
    backend = Squares()
    found = detect_tiled(backend, image, tile=256, overlap=0.25, batch_size=4)
    assert sorted(map(tuple, found.boxes.tolist())) == sorted((x, y, x + 24, y + 24) for x, y in corners)
    assert set(found.names) == {"square"} and (np.diff(found.scores) <= 0).all()
    assert {size for batch in backend.batches for size in batch} == {(256, 256)}
    assert max(map(len, backend.batches)) == 4 and sum(map(len, backend.batches)) == 6 * 7


def test_one_tile_is_the_untiled_detection(model):
    detector = Detector(model)
    image = photo((64, 64), (20, 40))
    whole, tiled = detector(image), detect_tiled(detector.backend, image, tile=64)
    np.testing.assert_allclose(tiled.boxes, whole.boxes, rtol=1e-6)
    np.testing.assert_allclose(tiled.scores, whole.scores, rtol=1e-6)
    assert tiled.names == whole.names == ("spot",)


@needs_data
def test_detector_takes_large_images_in_tiles(tmp_path):
    """At a fifteenth of the size a spot of six pixels is nowhere; in tiles it is found where it is."""
    tile = 128
    pipeline = [{"type": "Resize", "scale": [64, 64], "keep_ratio": True, "interpolation": "bilinear"}]
    model = spot_model(tmp_path / "spot.onnx", pipeline=pipeline)
    image = read_image(FULL).copy()
    image[:, :, 2] //= 2
    image[500:506, 700:706, 2] = 255
    detector = Detector(model, tile=tile, batch_size=8)
    best = detector(image)
    x1, y1, x2, y2 = best.boxes[0]
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((703, 503), abs=4)
    assert len(best) > 20, "every tile has its reddest pixel"
    whole = Detector(model)(image)
    assert len(whole) == 1 and best.scores[0] > whole.scores[0]
    small = next((REAL / "val").glob("*.png"))
    cropped = read_image(small)[:tile, :tile]
    np.testing.assert_array_equal(detector(cropped).boxes, Detector(model)(cropped).boxes)


def test_tiles_without_a_detection_give_none():
    found = detect_tiled(Squares(), np.zeros((100, 90, 3), np.uint8), tile=32)
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.classes == ("square",)
