"""The error texts that the page quotes are those that users see: each is provoked here."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from PIL import Image
from torch import nn
from torch.nn import functional as F

from castling_det.conversion.manifest import Drift, LayerMask, MaskRecord, ProbeRecord
from castling_det.conversion.mask_proof import Measurement, unproven
from castling_det.ops import linear_angular_attention

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = {
    heading: re.findall(r"```text\n(.*?)\n```", body, re.DOTALL)
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}


def quoted(heading, message, index=0):
    """Asserts that the page's text number `index` under `heading` is part of `message`; spaces count alike."""
    text = " ".join(SECTIONS[heading][index].split())
    assert text in " ".join(message.split()), f"the page says {text!r}, the error is {message!r}"


def raised(error):
    """As Python prints it."""
    return f"{error.type.__name__}: {error.value}"


def test_operators_are_missing():
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, 'castling_det_hook')]\n"
        "from mmcv.ops import nms"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    if done.returncode == 0:
        pytest.skip("mmcv has compiled operators here")
    quoted("mmcv's operators are missing", done.stderr)


def test_type_without_scope():
    init_default_scope("mmdet")
    with pytest.raises(KeyError) as error:
        MODELS.build(dict(type="CastlingViT"))
    quoted("A type is not in the registry", raised(error))
    assert MODELS.get("castling_det.CastlingViT") is not None


@torch.no_grad()
def test_levit_at_another_size():
    import timm

    image = torch.zeros(1, 3, 288, 288)
    with pytest.raises(RuntimeError) as error:
        timm.create_model("levit_128s").eval()(image)
    quoted("LeViT takes 224 x 224 only", raised(error))
    ours = MODELS.build(dict(type="castling_det.CastlingLeViT", attention="softmax")).eval()
    assert ours(image)[0].shape[-2:] == (36, 36)


def test_mask_is_not_empty():
    mask = MaskRecord(2.0, "uniform", 1.0, "checkpoint", None, {"blocks.0": LayerMask(0.1, 0.2, 64)})
    probes = ProbeRecord("generated", ("generated 0",), ((64, 64),), 0)
    measured = Measurement(probes, mask.layers, {"backbone.0": Drift(8, 0.5, 0.1)})
    quoted("The checkpoint's mask is not empty", unproven(mask, measured))


class _Attention(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


def test_counter_gives_zero(monkeypatch):
    lines = []
    monkeypatch.setattr("mmengine.analysis.jit_analysis.print_log", lambda text, *_, **__: lines.append(text))
    counted = get_model_complexity_info(_Attention(), inputs=(torch.randn(1, 2, 16, 8),))
    assert counted["flops"] == 0
    quoted("Attention costs nothing, says the counter", "\n".join(lines))


def test_half_precision():
    """As usually written, in float16: the sum's square overflows, and a zero token is 0 / 0. Ours is finite."""
    q, k, v = (torch.ones(1, 1, 4096, 8, dtype=torch.float16) for _ in range(3))
    v[:, :, 0] = k[:, :, 0] = q[:, :, 0] = 0
    total = v / 2 + (q / q.norm(dim=-1, keepdim=True)) @ ((k / 8**0.5).transpose(-2, -1) @ v) / 3.14
    usual = total / (total * total).sum(-1, keepdim=True).sqrt()
    assert usual[0, 0, 0].isnan().all() and not (usual[0, 0, 1:].float().norm(dim=-1) > 0.9).any()
    ours = linear_angular_attention(q, k, v)
    torch.testing.assert_close(ours[0, 0, 1:].float().norm(dim=-1), torch.ones(4095), rtol=0, atol=1e-2)
    assert ours.isfinite().all() and f"loss: {usual[0, 0, 0, 0].item()}" in SECTIONS[
        "The loss is NaN, or mAP is 0, in half precision"
    ]  # fmt: skip


def test_graph_with_a_fixed_size():
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    import numpy as np

    sizes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 64, 64]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "fixed", sizes[:1], sizes[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="invalid dimensions") as error:
        session.run(None, {"x": np.zeros((1, 3, 96, 64), np.float32)})
    quoted("I just want an ONNX file", raised(error))


def test_weights_that_do_not_fit(tmp_path):
    heading = "Pre-trained weights were not loaded"
    lines = []
    logger = logging.Logger("to read")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    load_state_dict(nn.Linear(2, 2), {"blocks.0.weight": torch.zeros(1)}, strict=False, logger=logger)
    quoted(heading, "\n".join(lines))
    options = dict(type="castling_det.CastlingViT", depth=1, num_heads=2)
    torch.save(MODELS.build(dict(options, embed_dims=48)).state_dict(), tmp_path / "w.pth")
    init_cfg = dict(type="castling_det.Pretrained", checkpoint=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError) as error:
        MODELS.build(dict(options, embed_dims=32, init_cfg=init_cfg)).init_weights()
    quoted(heading, raised(error), index=1)


def test_checkpoint_on_a_new_torch(tmp_path):
    from castling_det.conversion import load_checkpoint

    path = tmp_path / "c.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": {"loss": HistoryBuffer([1.0], [1])}}, path)
    with pytest.raises(Exception, match="HistoryBuffer") as error:
        torch.load(path, weights_only=True)
    quoted("A checkpoint does not load on torch 2.6 or newer", raised(error))
    assert load_checkpoint(path)["state_dict"]["a"].tolist() == [1.0, 1.0]


def test_classes_that_disagree(tmp_path):
    heading = "My classes do not train"
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    box = dict(id=1, image_id=1, category_id=7, bbox=[1, 1, 20, 20], area=400, iscrowd=0)
    coco = dict(
        images=[dict(id=1, file_name="1.png", width=64, height=64)],
        annotations=[box],
        categories=[dict(id=7, name="helmet")],
    )
    (tmp_path / "a.json").write_text(json.dumps(coco))
    options = dict(
        data_root=f"{tmp_path}/",
        ann_file="a.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("Helmet", "vest")),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[],
    )
    init_default_scope("mmdet")
    with pytest.raises(ValueError) as error:
        DATASETS.build(dict(type="CocoDataset", **options))
    quoted(heading, raised(error))
    with pytest.raises(ValueError) as error:
        DATASETS.build(dict(type="castling_det.CheckedCocoDataset", **options))
    quoted(heading, raised(error), index=1)


def test_image_size_is_refused():
    vit = MODELS.build(dict(type="castling_det.CastlingViT", embed_dims=32, depth=1, num_heads=2))
    with pytest.raises(ValueError) as error:
        vit(torch.zeros(1, 3, 250, 256))
    quoted("An image size is refused", raised(error))


def test_every_quoted_text_is_provoked():
    source = Path(__file__).read_text(encoding="utf-8")
    unquoted = [heading for heading, texts in SECTIONS.items() if texts and f'"{heading}"' not in source]
    assert not unquoted and sum(map(len, SECTIONS.values())) == 13
    with pytest.raises(AssertionError, match="the page says"):
        quoted("My classes do not train", "ValueError: need at least two arrays to concatenate")
