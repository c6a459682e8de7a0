"""The weights that are shown are those that the layers compute with; the pictures show them where they belong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from castling_det.conversion.detectors import build_detector
from castling_det.layers import CastlingAttention, LevitAttention, PooledAttention, attention_layers
from castling_det.report import attention_maps
from castling_det.report.attention_maps import (
    attention_picture,
    branch_weights,
    capture,
    read_picture,
)
from tools.attention import load_detector, main

HW = (5, 7)


LAYERS = {
    "castling": lambda **options: CastlingAttention(12, 3, num_prefix_tokens=2, **options),
    "levit": lambda **options: LevitAttention(12, 10, key_dim=4, num_heads=3, resolution=6, **options),
    "levit subsampled": lambda **options: LevitAttention(
        12, 10, key_dim=4, num_heads=3, query_stride=2, resolution=6, **options
    ),
    "mvit, fewer keys": lambda **options: PooledAttention(12, 3, stride_kv=2, grid=(4, 6), **options),
    "mvit, fewer queries": lambda **options: PooledAttention(12, 3, stride_q=2, grid=(4, 6), **options),
}


def randomised(make, **options):
    """Every parameter and statistic random, in float64, and tokens for it."""
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[make](**options).double().eval()
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.6
            value.copy_(noise.abs() + 0.5 if name.endswith(("running_var", "norm_q.weight")) else noise)
    prefix = getattr(layer, "num_prefix_tokens", 0)
    return layer, torch.randn(1, prefix + HW[0] * HW[1], 12, generator=generator, dtype=torch.float64)


@torch.no_grad()
def core(layer, x):
    """What the layer computes between its projections, without the local convolution: (B, H, M, V)."""
    if layer.dconv is not None:
        layer.dconv.weight.zero_()
    if isinstance(layer, CastlingAttention):
        merged = layer.attend(layer.qkv(x), HW)
    elif isinstance(layer, LevitAttention):
        q, k, v = (part.transpose(1, 2) for part in layer.head_inputs(x, HW)[:3])
        merged = layer.attend(q, k, v, HW)
    else:
        layer.proj = torch.nn.Identity()
        residual = layer.head_inputs(x, HW).q.transpose(1, 2).flatten(-2)
        merged = layer(x, HW)[0] - residual
    return merged.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)


@torch.no_grad()
def combined(layer, weights, v):
    """What the weights make of the values, (B, H, M, V), in the layer's mode; with the mask's branch in castling."""
    if layer.mode == "softmax":
        return weights.softmax @ v
    average = weights.linear / weights.divisor.unsqueeze(-1)
    if layer.mode == "linear":
        return average @ v
    kept = weights.softmax * (weights.softmax > layer.mask_state.absolute(v.shape[2])) * layer.mask_state.aux_scale
    if layer.options.normalizer == "l2":
        return torch.nn.functional.normalize((weights.linear + kept) @ v, dim=-1)
    return (average + kept) @ v / (1 + kept.sum(dim=-1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ["softmax", "linear", "castling"])
@pytest.mark.parametrize("make", LAYERS)
def test_weights_times_values_are_what_the_layer_computes(make, mode, normalizer):
    options = dict(threshold=0.8, threshold_unit="uniform", eval_aux=True) if mode == "castling" else {}
    layer, x = randomised(make, mode=mode, normalizer=normalizer, **options)
    layer.mask_state = dataclasses.replace(layer.mask_state, aux_scale=0.7)
    inputs = layer.head_inputs(x, HW)
    weights, expected = branch_weights(layer, inputs, HW), core(layer, x)
    torch.testing.assert_close(combined(layer, weights, inputs.v), expected, rtol=1e-10, atol=1e-12)
    # Negative controls: each value at its neighbour's place, no position biases, another mask.
    wrong = [combined(layer, weights, inputs.v.roll(1, dims=2))]
    if inputs.bias is not None:
        wrong.append(combined(layer, branch_weights(layer, inputs._replace(bias=None), HW), inputs.v))
    if mode == "castling":
        kept = weights.softmax > layer.mask_state.absolute(inputs.k.shape[2])
        assert 0 < float(layer.mask_stats.kept_fraction) < 1
        torch.testing.assert_close(kept.double().mean().float(), layer.mask_stats.kept_fraction)
        torch.testing.assert_close((weights.softmax * kept).sum(-1).mean().float(), layer.mask_stats.kept_mass)
        layer.mask_state = dataclasses.replace(layer.mask_state, threshold=1.2)
        wrong.append(combined(layer, weights, inputs.v))
    assert all((values - expected).abs().max() > 1e-2 for values in wrong)


@torch.no_grad()
def test_chosen_rows_are_those_of_all():
    layer, x = randomised("castling", mode="linear", normalizer="kernel")
    inputs = layer.head_inputs(x, HW)
    all_rows, some = (branch_weights(layer, inputs, HW, queries=queries) for queries in (None, [3, 30]))
    assert all_rows.linear.min() >= 0.5 - 1 / math.pi and all_rows.linear.max() <= 0.5 + 1 / math.pi
    for name in ("softmax", "linear", "divisor"):
        torch.testing.assert_close(getattr(some, name), getattr(all_rows, name)[:, :, [3, 30]])


@torch.no_grad()
def test_a_zero_token_stays_zero():
    layer, x = randomised("castling", mode="linear", qkv_bias=False)
    x[:, 5] = 0
    inputs = layer.head_inputs(x, HW)
    values = combined(layer, branch_weights(layer, inputs, HW), inputs.v)
    assert values.isfinite().all()
    torch.testing.assert_close(values, core(layer, x), rtol=1e-10, atol=1e-12)


BACKBONES = {
    "vit": dict(type="castling_det.CastlingViT", embed_dims=16, depth=2, num_heads=2, patch_size=8, img_size=64),
    "levit": dict(
        type="castling_det.CastlingLeViT",
        arch=dict(embed_dims=(16, 24), num_heads=(2, 3), depths=(1, 1), key_dim=8),
        out_indices=(0, 1, 2),
    ),
    "mvit": dict(
        type="castling_det.CastlingMViT", arch=dict(depths=(1, 1), embed_dims=16), img_size=64, out_indices=(0, 1)
    ),
}
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_shape", "scale_factor")),
]


def detector(family, tmp_path, **options):
    """A config file, a checkpoint file and an image of 60 x 90 pixels, which the pipeline brings to 64 x 96."""
    channels = {"vit": [16], "levit": [8, 16, 24], "mvit": [16, 32]}[family]
    text = dict(
        default_scope="mmdet",
        model=dict(
            type="RetinaNet",
            data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
            backbone=dict(BACKBONES[family], **{"attention": "castling", **options}),
            neck=dict(type="FPN", in_channels=channels, out_channels=8, num_outs=len(channels)),
            bbox_head=dict(
                type="RetinaHead", num_classes=1, in_channels=8, feat_channels=8, stacked_convs=1,
                anchor_generator=dict(
                    type="AnchorGenerator", scales=[4], ratios=[1.0], strides=[8, 16, 32][: len(channels)]),
            ),
        ),
        test_dataloader=dict(dataset=dict(type="CocoDataset", pipeline=PIPELINE)),
    )
    config, checkpoint, image = tmp_path / "c.py", tmp_path / "c.pth", tmp_path / "image.png"
    Config(text).dump(config)
    torch.manual_seed(0)
    torch.save({"state_dict": build_detector(Config.fromfile(config)).state_dict()}, checkpoint)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(image)
    return config, checkpoint, image


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_every_backbone_is_captured_as_it_runs(family, tmp_path):
    config, checkpoint, image = detector(family, tmp_path)
    loaded, model, meta = load_detector(config, checkpoint)
    names = list(attention_layers(model))
    assert len(names) == {"vit": 2, "levit": 3, "mvit": 2}[family]
    outputs = {}
    for name, layer in attention_layers(model).items():
        layer.register_forward_pre_hook(lambda _, arguments, name=name: outputs.update({name: arguments}))
        captured = capture(loaded, model, image, name, meta)
        x, hw = outputs[name]
        torch.testing.assert_close(captured.inputs.v, layer.head_inputs(x, hw).v)
        cells = captured.inputs.query_hw[0] * captured.inputs.query_stride * captured.stride
        assert captured.shape == (64, 96) and cells == 64, name
        cell = 64 // captured.inputs.query_hw[0]
        # (59, 29) of 90 x 60 pixels lies at x = 62.9, y = 30.9 of 96 x 64.
        assert captured.query_at((59, 29)) == (30 // cell, 62 // cell), name
    picture = attention_picture(captured, [(5, 55), (89, 0)], thresholds=[1.0, 0.01])
    assert picture.image.width > picture.image.height > 100
    assert "(89, 0) is row 0" in picture.caption and names[-1] in picture.caption


def test_the_panels_show_the_chosen_token(tmp_path, monkeypatch):
    options = dict(normalizer="kernel", threshold=1.0, threshold_unit="uniform")
    config, checkpoint, image = detector("vit", tmp_path, attn_cfg=options)
    loaded, model, meta = load_detector(config, checkpoint)
    captured = capture(loaded, model, image, "blocks.0", meta)
    # The image of 90 x 60 is seen at 96 x 64, where a token is 8 x 8: x = 80 lies at 85.3, y = 33 at 35.2.
    assert captured.query_at((80, 33)) == (4, 10)
    drawn = []
    monkeypatch.setattr(attention_maps, "_draw", lambda *arguments: drawn.append(arguments) or Image.new("RGB", (9, 9)))
    attention_picture(captured, [(80, 33)], head=1)
    row = branch_weights(captured.layer, captured.inputs, captured.hw, queries=[4 * 12 + 10])
    ((_, tokens, ((softmax, linear, mask),)),) = drawn
    assert tokens == [(4, 10)]
    np.testing.assert_allclose(softmax.values, row.softmax[0, 1, 0].reshape(8, 12))
    np.testing.assert_allclose(linear.values, (row.linear[0, 1, 0] / row.divisor[0, 1, 0]).reshape(8, 12))
    kept = row.softmax[0, 1, 0] > 1 / 96
    np.testing.assert_allclose(np.nan_to_num(mask.values), (row.softmax[0, 1, 0] * kept).reshape(8, 12))
    assert 0 < np.isnan(mask.values).sum() < mask.values.size
    assert f"keeps {float(kept.double().mean()):.1%}" in mask.title and "at 1/N" in mask.title
    other = branch_weights(captured.layer, captured.inputs, captured.hw, queries=[10 * 8 + 4])
    assert np.abs(softmax.values - other.softmax[0, 1, 0].reshape(8, 12).numpy()).max() > 1e-6


def test_the_token_is_marked_where_it_lies(tmp_path):
    config, checkpoint, image = detector("vit", tmp_path)
    Image.new("RGB", (90, 60), (0, 90, 0)).save(image)
    loaded, model, _ = load_detector(config, checkpoint)
    pixels = np.asarray(attention_picture(capture(loaded, model, image), [(80, 33)]).image).astype(int)
    first = pixels[:, : pixels.shape[1] // 4]
    inside = np.argwhere((first[..., 1] > 60) & (first[..., 0] < 20))  # the green image
    (top, left), (bottom, right) = inside.min(0), inside.max(0)
    outline = np.argwhere((first[top:bottom, left:right] > 230).all(-1)).mean(0) / (bottom - top, right - left)
    np.testing.assert_allclose(outline, [(4.5 * 8) / 64, (10.5 * 8) / 96], atol=0.02)


def test_windows_are_refused(tmp_path):
    config, checkpoint, image = detector("vit", tmp_path, attention="softmax")
    loaded, model, _ = load_detector(config, checkpoint)
    model.backbone.blocks[0].window_size = 2
    with pytest.raises(ValueError, match=r"'blocks\.0': attends in 24 windows"):
        capture(loaded, model, image, "blocks.0")


def test_errors_name_what_is_wrong(tmp_path):
    config, checkpoint, image = detector("vit", tmp_path)
    loaded, model, _ = load_detector(config, checkpoint)
    captured = capture(loaded, model, image)
    for call, message in [
        (lambda: capture(loaded, model, image, "blocks.9"), "expected one of blocks.0, blocks.1"),
        (lambda: capture(loaded, model, tmp_path / "no.png"), "cannot be read"),
        (lambda: attention_picture(captured, [(90, 3)]), r"expected x in \[0, 90\)"),
        (lambda: attention_picture(captured, [(1, 1)], head=2), "head=2: expected 0 to 1"),
        (lambda: attention_picture(captured, []), "at least one"),
        (lambda: read_picture(image), "has no caption"),
        (lambda: read_picture(config), "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_tool(tmp_path, capsys):
    def run(*arguments):
        return main([str(argument) for argument in arguments])

    config, checkpoint, image = detector("levit", tmp_path)
    assert run(config, checkpoint, image, "--list") == 0
    names = capsys.readouterr().out.split()
    assert "stages.1.downsample.attn_downsample" in names
    out = tmp_path / "out.png"
    assert run(config, checkpoint, image, "--layer", names[1], "--point", 9, 9, "--out", out) == 0
    assert read_picture(out).caption in capsys.readouterr().out
    assert run(config, checkpoint, image, "--layer", "no", "--out", tmp_path / "b.png") == 1
    assert "expected one of" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
    assert run(config, checkpoint, image) == 1
    assert "--out" in capsys.readouterr().err
