"""`Detector` on an ONNX file: coordinates, batches, channel order, padding, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest

import castling_det
from castling_det.runtime.detector import Detector
from castling_det.runtime.onnx_detector import OnnxDetector
from tests.runtime.conftest import METADATA, photo, spot_model


def centre(detections):
    (box,) = detections.boxes
    return (box[1] + box[3]) / 2, (box[0] + box[2]) / 2


def test_three_lines(model):
    detector = castling_det.Detector(model)
    detections = detector(photo())
    assert detections.names == ("spot",) and detections.classes == ("leaf", "spot") and len(detections) == 1
    np.testing.assert_allclose(detections.boxes, [[36.5, 16.5, 44.5, 24.5]], atol=1.01)
    assert detections.scores[0] == pytest.approx(250 / 255, rel=1e-5)
    assert len(Detector(model, score_thr=0.98)(photo())) == 1 and len(Detector(model, score_thr=0.99)(photo())) == 0


@pytest.mark.parametrize(("hw", "spot"), [((48, 64), (20, 40)), ((300, 200), (250, 31)), ((64, 500), (30, 470))])
def test_boxes_are_in_the_images_own_pixels(model, hw, spot):
    """A large spot survives the resize to 64; its centre is found to within one pixel of the network's."""
    image = photo(hw, None)
    size = max(hw) // 20
    image[spot[0] - size : spot[0] + size, spot[1] - size : spot[1] + size, 2] = 255
    y, x = centre(Detector(model)(image))
    step = max(hw) / 64
    assert abs(y - spot[0]) <= size + step and abs(x - spot[1]) <= size + step
    assert (y, x) != pytest.approx((spot[1], spot[0]), abs=size), "x and y are not exchanged"


def test_a_batch_equals_its_images_one_by_one(model):
    images = [photo((48, 64), (9 + 3 * i, 50 - 4 * i), red=200 + i, seed=i) for i in range(5)]
    images.insert(2, photo((64, 20), (30, 10), red=230, seed=9))
    single, batched = Detector(model), Detector(model, batch_size=4)
    for one, many in zip(map(single, images), batched.detect(images), strict=True):
        np.testing.assert_array_equal(one.boxes, many.boxes)
        np.testing.assert_array_equal(one.scores, many.scores)
    assert len({tuple(found.boxes[0]) for found in batched.detect(images)}) == 6, "each image has its own"


def test_padding_takes_the_files_values(tmp_path):
    """The graph's zeros: a third channel padded with 254 is the reddest of all."""
    loud = spot_model(tmp_path / "loud.onnx", pad_values=[0.0, 0.0, 254.0])
    detections = Detector(loud)(photo((40, 64)))
    assert detections.scores[0] == pytest.approx(254 / 255, rel=1e-5)
    assert (detections.boxes >= 0).all() and (detections.boxes[:, 3] <= 40).all(), "clipped to the image"


def test_every_step_of_the_pipeline_is_used(tmp_path):
    plain, equalized = (
        spot_model(tmp_path / f"{len(steps)}.onnx", pipeline=steps)
        for steps in (METADATA["pipeline"], [{"type": "Equalize"}, *METADATA["pipeline"]])
    )
    image = photo(red=100)
    assert Detector(plain)(image).scores[0] == pytest.approx(100 / 255, rel=1e-5)
    assert Detector(equalized)(image).scores[0] == 1.0


RESIZE = METADATA["pipeline"][0]
LIES = {
    "no format": (dict(format=None), r"not one of castling_det \(no castling_det.format.*export_onnx"),
    "next format": (dict(format="2"), r"format '2': this version of castling_det reads '1'"),
    "raw outputs": (dict(outputs="raw"), r"spot.onnx: outputs='raw': expected 'detections'; export without --raw"),
    "no preprocessing": (dict(preprocessing="outside"), r"preprocessing='outside'.*--no-preprocessing"),
    "no JSON": (dict(texts={"classes": "[1"}), r"metadata do not fit: "),
    "deep": (dict(texts={"classes": "[" * 100_000}), r"metadata do not fit: "),
    "missing": (dict(classes=None), r"missing required field `classes`"),
    "no classes": (dict(classes=3), r"Expected `array`, got `int` - at `\$.classes`"),
    "one pad value": (dict(pad_values=[1.0]), r"length 3.*\$.pad_values"),
    "true as divisor": (dict(pad_size_divisor=True), r"got `bool` - at `\$.pad_size_divisor"),
    "divisor 0": (dict(pad_size_divisor=0), r"`int` >= 1 - at `\$.pad_size_divisor"),
    "unknown step": (dict(pipeline=[{"type": "Rotate"}]), r"Invalid value 'Rotate' - at `\$.pipeline"),
    "half a step": (dict(pipeline=[{"type": "Resize", "scale": [1, 1]}]), r"missing required field `keep_ratio`"),
    "endless pipeline": (dict(pipeline=[RESIZE] * 17), r"`array` of length <= 16 - at `\$.pipeline"),
    "endless size": (dict(pipeline=[{**RESIZE, "scale": [10**6, 10**6]}]), r"`int` <= 4096 - at `\$.pipeline"),
}


@pytest.mark.parametrize("kind", LIES)
def test_metadata_that_lie_are_one_line(tmp_path, kind):
    changes, message = LIES[kind]
    with pytest.raises(ValueError, match=message) as refused:
        Detector(spot_model(tmp_path / "spot.onnx", **changes))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_outputs_that_do_not_fit_are_one_line(tmp_path):
    for changes, message in (
        (dict(label=2), r"spot.onnx: gives label 2, but names 2 classes; export it again"),
        (dict(half_side=np.nan), r"spot.onnx: gives boxes or scores that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Detector(spot_model(tmp_path / "spot.onnx", **changes))(photo())


def test_a_file_that_names_weights_elsewhere_is_refused(tmp_path, monkeypatch):
    """Below 1.18 onnxruntime reads any path that a file names; later versions and we refuse."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(spot_model(tmp_path / "spot.onnx"))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../../../etc/passwd")
    (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"outside.onnx: not an ONNX file that onnxruntime reads"):
        Detector(tmp_path / "outside.onnx")
    monkeypatch.setattr("onnxruntime.__version__", "1.17.3")
    with pytest.raises(ValueError, match=r"onnxruntime 1.17.3 reads any file.*pip install 'onnxruntime>=1.18'"):
        Detector(tmp_path / "spot.onnx")


def test_another_interface_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"outputs .*expected float images \(batch, 3, height, width\), and"):
        Detector(spot_model(tmp_path / "two.onnx", output_names=("boxes", "scores")))
    with pytest.raises(ValueError, match=r"inputs .* 4, \[4\]\).*expected float images"):
        Detector(spot_model(tmp_path / "four.onnx", channels=4))


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "page.onnx").write_text("<html>Not found</html>")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "cut.onnx").write_bytes(spot_model(tmp_path / "whole.onnx").read_bytes()[:700])
    for name in ("page", "empty", "cut"):
        with pytest.raises(ValueError, match=rf"model .*{name}.onnx: not an ONNX file that onnxruntime reads"):
            Detector(tmp_path / f"{name}.onnx")
    with pytest.raises(ValueError, match=r"none.onnx: no such file"):
        Detector(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"expected an .onnx file or a checkpoint .pth"):
        Detector(tmp_path / "model.engine")
    (tmp_path / "deploy.pth").touch()
    with pytest.raises(ValueError, match=r"deploy.pth: a checkpoint needs its config"):
        Detector(tmp_path / "deploy.pth")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"number of channels: 4; expected 3"),
        (np.zeros((4, 4), np.uint8), r"number of channels: none, its shape is \(4, 4\); expected 3"),
        (np.zeros((4, 4, 3), np.float32), r"values of type float32: expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"0 x 4 pixels: expected at least one"),
        (np.zeros((40, 26, 3), np.uint8), r"40 x 26 pixels: expected at least one and at most 1,024 in all"),
        ([1, 2], r"list: expected a file"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(getattr(value, "shape", value)),
)
def test_arrays_that_are_no_images(model, image, message):
    with pytest.raises(ValueError, match=message):
        Detector(model, max_pixels=1024)(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device="gpu"), r"device='gpu': expected 'cpu', 'cuda' or 'cuda:N'"),
        (dict(score_thr=2), r"score_thr=2"),
        (dict(batch_size=0), r"batch_size=0"),
        (dict(tile=3), r"tile=3: expected at least 16"),
        (dict(overlap=1.0), r"overlap=1.0"),
        (dict(config="c.py"), r"config c.py: .*spot.onnx is an ONNX file, which needs none"),
    ],
    ids=str,
)
def test_settings_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        Detector(model, **options)


def test_a_device_that_is_not_there(model):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ValueError, match=r"device='cuda:0': this onnxruntime has .*CPUExecutionProvider"):
        OnnxDetector(model, device="cuda:0")
