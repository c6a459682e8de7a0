"""Layer-wise learning rates through mmengine's own optimizer building."""

from __future__ import annotations

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from castling_det.models import CastlingViT


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = CastlingViT(16, depth=3, num_heads=2, img_size=32)
        self.head = nn.Linear(4, 4)


def optimizer(model, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            constructor="castling_det.LayerDecayOptimWrapperConstructor",
            optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1),
            paramwise_cfg=paramwise,
        ),
    ).optimizer


def test_rates_fall_with_depth():
    model = Detector()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer(model, decay_rate=0.5, norm_decay_mult=0.0).param_groups
    by_name = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert set(by_name) == set(names.values())
    rates = {name: group["lr"] for name, group in by_name.items()}
    assert rates["head.weight"] == rates["backbone.norm.weight"] == 1.0
    assert rates["backbone.blocks.2.attn.qkv.weight"] == 0.5
    assert rates["backbone.blocks.0.mlp.fc1.bias"] == 0.125
    assert rates["backbone.pos_embed"] == rates["backbone.patch_embed.proj.weight"] == 0.0625
    assert by_name["backbone.blocks.1.norm1.weight"]["weight_decay"] == 0.0
    assert by_name["backbone.blocks.1.attn.qkv.weight"]["weight_decay"] == 0.1


@pytest.mark.parametrize("rate", [None, 0.0, 1.5])
def test_bad_rate(rate):
    with pytest.raises(ValueError, match=rf"decay_rate={rate}: expected a number in \(0, 1\]"):
        optimizer(Detector(), **({} if rate is None else {"decay_rate": rate}), norm_decay_mult=0.0)


def test_a_backbone_without_depth_is_refused():
    with pytest.raises(ValueError, match="no backbone with get_layer_depth"):
        optimizer(nn.Sequential(nn.Linear(2, 2)), decay_rate=0.5)
