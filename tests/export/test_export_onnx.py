"""tools/export_onnx.py: one file that runs at any size, what it says of itself, and every refusal."""

from __future__ import annotations

import errno
import os

import numpy as np
import onnx
import pytest
import torch

from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.export import onnx as exporting
from castling_det.export.checks import check_linear_only
from castling_det.export.graph import onnx_model, onnx_runner, trace
from castling_det.export.inputs import example_images, example_shape, image_pipeline
from castling_det.export.network import DeployedDetector
from castling_det.export.onnx import export_onnx
from castling_det.runtime.metadata import PREFIX, ModelMetadata
from castling_det.runtime.preprocess import Equalize, Pad, Resize
from tests.export.conftest import randomised, tiny_config
from tools import export_onnx as tool

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def traced():
    """The program of the tiny GFL detector and its ONNX form; tracing is most of the time of an export."""
    kept = {}

    def remember(name, function):
        def call(*args, **kwargs):
            if name not in kept:
                kept[name] = function(*args, **kwargs)
            return kept[name]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("trace", "onnx_model"):
            patch.setattr(exporting, name, remember(name, getattr(exporting, name)))
        yield


@pytest.fixture
def exported(traced, deployable, tmp_path):
    """Exports the tiny GFL detector; `exported(**options)` gives the report."""
    config, checkpoint = deployable("gfl_vit")

    def export(**options):
        return export_onnx(config, checkpoint, tmp_path / "out" / "tiny.onnx", **options)

    return export


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_the_file_gives_mmdetections_detections_at_sizes_it_was_not_traced_with(exported, tiny):
    report = exported()
    network = DeployedDetector(tiny("gfl_vit")[1]).eval()
    assert not {example_shape(network)} & {result.shape for result in report.parity}
    assert len({result.shape[0] for result in report.parity}) == 3 and all(one.detections for one in report.parity)
    assert any(result.shape[1] != result.shape[2] for result in report.parity)
    run = onnx_runner(report.path)
    for shape in [(1, 32, 32), (4, 32, 256), (1, 288, 64)]:
        images, sizes = example_images(network, shape).numpy(), np.float32([shape[1:]] * shape[0])
        found = run(images, sizes)
        assert found["boxes"].shape == (shape[0], 30, 4) and found["scores"].shape == (shape[0], 30)
        assert found["boxes"].dtype == found["scores"].dtype == np.float32 and found["labels"].dtype == np.int64
        assert ((found["labels"] == -1) == (found["scores"] == 0)).all()
        for name, value in run(images, None).items():
            np.testing.assert_array_equal(value, found[name], err_msg="without sizes nothing is padding")
        assert run(images, sizes - 9)["boxes"].max() <= max(shape) - 9
    assert "parity with PyTorch at 3 sizes" in report.summary() and "no softmax attention" in report.summary()


def test_the_file_is_a_valid_model_with_one_nms_and_no_path_of_this_machine(exported):
    path = exported().path
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert sum(node.op_type == "NonMaxSuppression" for node in model.graph.node) == 1
    assert {node.domain for node in model.graph.node} == {""}
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_value for size in sizes] == [0, 3, 0, 0]
    assert [value.name for value in model.graph.input] == ["images", "sizes"]
    assert os.getcwd().encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_the_metadata_say_what_a_reader_needs(exported):
    report = exported()
    found = metadata(report.path)
    assert found[f"{PREFIX}format"] == '"1"' and found[f"{PREFIX}classes"] == '["tree", "shrub", "rock"]'
    assert ModelMetadata.from_properties(found, "tiny.onnx") == report.metadata
    assert report.metadata.pad_values == (103.53, 116.28, 123.675) and report.metadata.mean[0] == 123.675
    assert report.metadata.pipeline == (Resize((64, 96), True, "bilinear"),)
    assert report.metadata.nms_iou == 0.6 and report.metadata.input_size == (64, 96)


STEPS = [
    (dict(type="Resize", scale=(97, 64), keep_ratio=True), Resize((64, 97), True, "bilinear")),
    (dict(type="mmdet.Equalize", prob=1.0), Equalize()),
    (dict(type="Pad", size=(96, 64), pad_val=dict(img=(1, 2, 3))), Pad((64, 96), (1.0, 2.0, 3.0))),
    (dict(type="Pad", size=(96, 64), pad_val=7), Pad((64, 96), (7.0, 7.0, 7.0))),
    (dict(type="Equalize", prob=0.5), None),
    (dict(type="Resize", scale_factor=2.0), None),
    (dict(type="Resize", scale=(97, 64), interpolation="sinc"), None),
    (dict(type="Resize", scale=(97, 20_000)), None),
    (dict(type="Pad", size_divisor=32), None),
    (dict(type="RandomFlip", prob=0.5), None),
    (dict(type="LoadImageFromFile", to_float32=True), None),
]


@pytest.mark.parametrize(("step", "expected"), STEPS, ids=str)
def test_the_pipeline_is_described_or_refused(step, expected):
    config = tiny_config("gfl_vit")
    config.test_dataloader.dataset.pipeline = [dict(type="LoadImageFromFile"), step, dict(type="PackDetInputs")]
    if expected is not None:
        assert image_pipeline(config) == (expected,)
        return
    with pytest.raises(ValueError, match=r"test pipeline: .*an exported file"):
        image_pipeline(config)


def test_raw_heads_are_the_heads_own_maps(exported):
    report = exported(raw=True)
    assert report.metadata.outputs == "raw"
    found = onnx_runner(report.path)(np.zeros((2, 3, 64, 96), np.float32), None)
    assert {name: value.shape for name, value in found.items()} == {
        "raw_cls_score_0": (2, 3, 8, 12),
        "raw_cls_score_1": (2, 3, 4, 6),
        "raw_bbox_pred_0": (2, 36, 8, 12),
        "raw_bbox_pred_1": (2, 36, 4, 6),
    }
    assert not any(node.op_type == "NonMaxSuppression" for node in onnx.load(report.path).graph.node)


def test_int8_quantises_the_linear_layers_alone(exported):
    whole, small = exported(), exported(precision="int8")
    nodes = [node.op_type for node in onnx.load(small.path).graph.node]
    # qkv, proj, fc1 and fc2 of one block; the products of the attention keep their precision.
    assert nodes.count("MatMulInteger") == 4 and nodes.count("MatMul") >= 2
    worst = [max(result.raw for result in report.parity) for report in (whole, small)]
    assert "reported only" in small.summary() and worst[1] > worst[0]


def test_a_file_that_differs_from_pytorch_is_not_written(exported, tmp_path, monkeypatch):
    run = exporting.onnx_runner

    def shifted(model, **options):
        inner = run(model, **options)
        return lambda *given: {name: value + (name == "boxes") for name, value in inner(*given).items()}

    monkeypatch.setattr(exporting, "onnx_runner", shifted)
    with pytest.raises(
        ValueError, match=r"differs from PyTorch beyond the tolerance at 1 x .*\d+ unmatched of \d+ detections"
    ):
        exported()
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_full_disk_leaves_the_older_file_and_nothing_else(exported, monkeypatch):
    report = exported()
    before = report.path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); an older one is as it was"):
        exported()
    assert report.path.read_bytes() == before
    assert [path.name for path in report.path.parent.iterdir()] == ["tiny.onnx"]


def test_softmax_attention_in_the_graph_is_refused(tiny):
    detector = randomised(build_detector(with_attention(tiny_config("gfl_vit"), "softmax")))
    with pytest.raises(ValueError, match=r"1 softmax attentions are left in the graph, in detector\.backbone\."):
        check_linear_only(trace(DeployedDetector(detector).eval()))


class _Fused(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("part", [torch.nn.Softmax(-1), _Fused()], ids=["softmax", "fused"])
@pytest.mark.parametrize("place", ["backbone", "head"])
def test_softmax_is_refused_in_the_backbone_and_fused_attention_everywhere(part, place):
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = (part if name == place else torch.nn.Identity() for name in ("backbone", "head"))

        def forward(self, x):
            return self.head(self.backbone(x))

    program = torch.export.export(Detector(), (torch.randn(2, 3, 4, 4),))
    if place == "head" and isinstance(part, torch.nn.Softmax):
        check_linear_only(program)  # the distributions of GFL's boxes, class scores: no attention
        return
    with pytest.raises(ValueError, match=rf"1 softmax attentions are left in the graph, in {place} \("):
        check_linear_only(program)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["picodet_levit", "rtmdet_levit", "gfl_mvit", "retinanet_vit", "mask_rcnn_vit"])
def test_every_family_exports(deployable, tmp_path, family):
    config, checkpoint = deployable(family)
    report = export_onnx(config, checkpoint, tmp_path / "out.onnx")
    assert all(result.detections for result in report.parity)
    assert ("boxes only" in " ".join(report.metadata.notes)) == (family == "mask_rcnn_vit")


@pytest.mark.slow
def test_float16_accumulates_in_float32(deployable, tmp_path):
    config, checkpoint = deployable("gfl_vit")
    report = export_onnx(config, checkpoint, tmp_path / "half.onnx", precision="float16")
    graph = onnx.load(report.path).graph
    types = {entry.name: entry.type.tensor_type.elem_type for entry in graph.value_info}
    norms = [node for node in graph.node if node.op_type in ("ReduceL2", "LayerNormalization")]
    assert norms and all(types[node.output[0]] == onnx.TensorProto.FLOAT for node in norms)
    assert any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in graph.initializer)


def arguments(tmp_path, config, checkpoint, *more):
    path = tmp_path / "tiny.py"
    config.dump(path)
    return [str(path), str(checkpoint), str(tmp_path / "out.onnx"), *more]


def test_the_tool_reports_and_exits_with_zero(traced, deployable, tmp_path, capsys):
    assert tool.main(arguments(tmp_path, *deployable("gfl_vit"))) == 0
    assert "attention: linear; no softmax attention in the graph" in capsys.readouterr().out
    assert (tmp_path / "out.onnx").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, _: [str(a[0]) + "x", *a[1:]], "no such file; give a .py config"),
        (lambda a, _: [a[0], str(a[1]) + "x", a[2]], "no such file; check the path"),
        (lambda a, _: [a[0], a[0], a[2]], "not a checkpoint"),
        (lambda a, _: [*a[:2], a[2] + ".pth"], "expected a .onnx file"),
        (lambda a, folder: [*a[:2], str(folder / "folder.onnx")], "is a folder"),
        (lambda a, _: [*a, "--shapes", "64x64"], "--shapes 64x64: expected batch, height and width"),
        (lambda a, _: [*a, "--shapes", "1x50x64"], "50"),
    ],
)
def test_the_tool_refuses_in_one_line(traced, deployable, tmp_path, capsys, change, message):
    (tmp_path / "folder.onnx").mkdir()
    given = change(arguments(tmp_path, *deployable("gfl_vit")), tmp_path)
    assert tool.main(given) == 1
    line = capsys.readouterr().err
    assert message in line and line.startswith("export_onnx: ") and line.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists() and not list(tmp_path.glob(".*part*"))


def test_every_linear_export_asks_for_softmax_in_its_graph(exported, monkeypatch):
    def refuse(program):
        raise ValueError("asked")

    monkeypatch.setattr(exporting.checks, "check_linear_only", refuse)
    with pytest.raises(ValueError, match="asked"):
        exported()


def test_a_softmax_detector_is_exported_as_a_baseline(deployable, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "trace", trace)  # not the program that the other tests share
    monkeypatch.setattr(exporting, "onnx_model", onnx_model)
    config = with_attention(tiny_config("gfl_vit"), "softmax")
    config.model.backbone.update(window_size=2, global_indices=(0,))
    _, checkpoint = deployable("gfl_vit", cfg=config.pretty_text)
    report = export_onnx(config, checkpoint, tmp_path / "out.onnx")
    assert "attention: softmax\n" in report.summary() and report.metadata.attention == "softmax"
    assert "Softmax" in {node.op_type for node in onnx.load(report.path).graph.node}


def test_what_was_trained_otherwise_is_refused(deployable, tmp_path):
    config, checkpoint = deployable("gfl_vit")
    with pytest.raises(ValueError, match=r"trained with attention='linear' but the config has attention='softmax'"):
        export_onnx(with_attention(config, "softmax"), checkpoint, tmp_path / "out.onnx")
    hybrid = with_attention(config, "castling")
    _, checkpoint = deployable("gfl_vit", cfg=hybrid.pretty_text)
    with pytest.raises(ValueError, match=r"attention='castling' and is not converted; run tools/convert.py"):
        export_onnx(hybrid, checkpoint, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_torch_whose_exporters_fail_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(ValueError, match=r"^torch 2\.7\.1\+cpu cannot export detectors; install torch >= 2\.8$"):
        export_onnx("no.py", "no.pth", tmp_path / "x.onnx")
