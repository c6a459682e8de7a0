"""Multiply-adds against hand-derived numbers and against PyTorch's own counter on unfused attention."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from castling_det.config import load_config
from castling_det.layers import CastlingAttention
from castling_det.report.closed_forms import _CLOSED_FORMS, register_closed_form
from castling_det.report.complexity import ModuleMacs, count_macs, detector_complexity
from castling_det.report.complexity_text import complexity_table, read_complexity, write_complexity


def _total(modules: tuple[ModuleMacs, ...]) -> int:
    return sum(sum(module.macs.values()) for module in modules)


def _by_kind(modules: tuple[ModuleMacs, ...]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for module in modules:
        for kind, macs in module.macs.items():
            kinds[kind] = kinds.get(kind, 0) + macs
    return kinds


def _counter_macs(model: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """PyTorch's counter, 2 flops a multiply-add, with softmax attention as two plain matrix products."""
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(*inputs, **keywords)
    return int(flops.get_total_flops()) // 2


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 2 * 5 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (3, 1), stride=2, groups=2), (1, 4, 9, 8), 4 * 4 * 6 * 2 * 3),
        (nn.Conv2d(8, 8, 3, groups=8, dilation=2), (1, 8, 9, 9), 5 * 5 * 8 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 7), 5 * 7 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 7), 5 * 7 * 4 * 3 * 9),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_module_costs_what_its_formula_says(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    x = torch.randn(shape)
    assert _total(count_macs(module, x)) == expected
    assert _counter_macs(module, x) == expected


def test_what_is_done_once_an_element_is_free() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2)
    )
    assert count_macs(model, torch.randn(1, 4, 8, 8)) == ()


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize("mode", ["softmax", "linear", "castling"])
def test_castling_attention_is_counted_once_and_in_full(mode: str, local_conv: str | None, normalizer: str) -> None:
    dim, hw = 24, (5, 7)
    layer = CastlingAttention(dim, 3, mode=mode, local_conv=local_conv, normalizer=normalizer)
    x = torch.randn(2, hw[0] * hw[1], dim)
    modules = count_macs(layer, x, hw)
    assert [module.name for module in modules] == [""], "qkv, proj and dconv are counted by their parent"
    assert _total(modules) == _counter_macs(layer, x, hw)
    products = 2 * 35 * 35 * dim if mode == "softmax" else 2 * 35 * dim * dim // 3
    assert _by_kind(modules)["attention_values"] == products
    assert _by_kind(modules)["projections"] == 2 * 35 * 4 * dim * dim


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sources", [6, 11])
def test_multihead_attention_counts_its_softmax(batch_first: bool, sources: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first)

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            out = self.attn(query=query, key=memory, value=memory)[0]
            assert isinstance(out, Tensor)
            return out

    query, memory = (torch.randn(2, n, 12) if batch_first else torch.randn(n, 2, 12) for n in (6, sources))
    model = Decoder().requires_grad_(True)
    by_hand = 2 * (6 * 12 * 12 * 2 + sources * 12 * 12 * 2 + 2 * 6 * sources * 12)
    assert _total(count_macs(model, query, memory)) == by_hand
    assert _counter_macs(model, query, memory) == by_hand


def test_a_shared_layer_counts_every_call() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1)

        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            return [self.conv(x) for x in maps]

    (record,) = count_macs(Head(), [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2)])
    assert record.calls == 2 and record.macs == {"conv": 15 * (16 + 4)} and record.params == 20


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _HiddenProducts(nn.Module):
    """Has a known child and multiplies matrices by itself, with no parameter that would give it away."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_an_unknown_module_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Unknown())
    with pytest.raises(ValueError, match=r"no closed form for 1: _Unknown"):
        count_macs(model, torch.randn(3, 4))


@pytest.mark.parametrize("fused", [True, False])
def test_products_outside_of_every_closed_form_are_an_error_that_names_the_module(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), _HiddenProducts(fused))
    with pytest.raises(ValueError, match=rf"no closed form covers, in 1 \({2 * 2 * 6 * 6 * 4} macs\)"):
        count_macs(model, torch.randn(2, 1, 6, 4))


def test_a_registered_closed_form_makes_a_module_known() -> None:
    register_closed_form(_HiddenProducts)(lambda module, call: {"attention_scores": 1000, "projections": 500})
    try:
        assert _total(count_macs(_HiddenProducts(), torch.randn(1, 6, 4))) == 1500
    finally:
        del _CLOSED_FORMS[_HiddenProducts]


def test_modes_and_hooks_are_as_before() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    count_macs(model, torch.randn(1, 2))
    assert [module.training for module in model.modules()] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())


def _gfl(attention: str | None) -> Config:
    """A tiny GFL: ResNet-18 and FPN, or CastlingViT."""
    backbone: dict[str, Any] = dict(type="ResNet", depth=18, out_indices=(1, 2, 3), num_stages=4)
    channels = [128, 256, 512]
    if attention is not None:
        backbone = dict(
            type="castling_det.CastlingViT", embed_dims=32, depth=2, num_heads=2, patch_size=16, img_size=64,
            attention=attention,
        )  # fmt: skip
        channels = [32]
    strides = [8, 16, 32] if attention is None else [16]
    return Config(
        dict(
            model=dict(
                type="GFL",
                data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
                backbone=backbone,
                neck=dict(type="FPN", in_channels=channels, out_channels=16, num_outs=len(channels)),
                bbox_head=dict(
                    type="GFLHead", num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1, reg_max=4,
                    norm_cfg=dict(type="GN", num_groups=4),
                    anchor_generator=dict(
                        type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=strides
                    ),
                    loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
                ),
                test_cfg=dict(),
            )
        )
    )  # fmt: skip


@pytest.mark.parametrize("attention", [None, "softmax", "linear", "castling"])
def test_a_detector_equals_the_counter(attention: str | None) -> None:
    from mmdet.registry import MODELS

    config = _gfl(attention)
    complexity = detector_complexity(config, (64, 90), name="tiny")
    assert complexity.padded_shape == (64, 96)
    model = MODELS.build(config.model)
    assert complexity.macs == _counter_macs(model, torch.randn(1, 3, 64, 96), None, mode="tensor")
    assert complexity.gmacs == complexity.macs / 1e9
    assert complexity.params == sum(parameter.numel() for parameter in model.parameters())
    assert set(complexity.macs_by_part) == {"backbone", "neck", "bbox_head"}
    assert sum(complexity.macs_by_part.values()) == sum(complexity.macs_by_kind.values()) == complexity.macs
    if attention is not None:
        tokens, dim, depth = 4 * 6, 32, 2
        per_product = tokens * tokens * dim if attention == "softmax" else tokens * dim * dim // 2
        assert complexity.macs_by_kind["attention_scores"] == depth * per_product
        assert complexity.macs_by_kind["mlp"] == depth * 2 * tokens * dim * 4 * dim


def test_linear_attention_grows_with_the_tokens_and_softmax_with_their_square() -> None:
    def scores(attention: str, side: int) -> int:
        return detector_complexity(_gfl(attention), (side, side)).macs_by_kind["attention_scores"]

    assert scores("linear", 128) == 4 * scores("linear", 64)
    assert scores("softmax", 128) == 16 * scores("softmax", 64)


def test_the_record_survives_json_and_prints_its_unit(tmp_path: Path) -> None:
    complexity = detector_complexity(_gfl("linear"), (64, 64), name="tiny.py")
    write_complexity(tmp_path / "c.json", complexity)
    assert read_complexity(tmp_path / "c.json") == complexity
    text = complexity_table(complexity, by_module=True)
    assert "gmacs" in text and "backbone.blocks.1.attn (CastlingAttention)" in text and "64 x 64" in text
    assert f"{complexity.params:,}" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        complexity.macs = 0  # type: ignore[misc]
    (tmp_path / "c.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(ValueError, match=r"c\.json: schema='other': expected"):
        read_complexity(tmp_path / "c.json")


def test_bad_shapes_and_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape=\(0, 64\)"):
        detector_complexity(_gfl(None), (0, 64))
    with pytest.raises(ValueError, match=r"nothing\.py: no such file"):
        load_config(tmp_path / "nothing.py")
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    with pytest.raises(ValueError, match=r"broken\.py: cannot be read"):
        load_config(broken)
