"""The three backbones at small sizes, with parameters drawn anew."""

from __future__ import annotations

import torch

from castling_det.models import CastlingLeViT, CastlingMViT, CastlingViT

LEVIT = dict(embed_dims=(16, 24, 32), num_heads=(2, 2, 3), depths=(2, 1, 1), key_dim=8)
MVIT = dict(depths=(1, 2, 2, 1), embed_dims=8)
_VIT = dict(embed_dims=32, depth=3, num_heads=2, img_size=64, patch_size=16, out_indices=(0, -1))
_PREFIX = dict(with_cls_token=True, num_reg_tokens=2)
VARIANTS = {
    "vit": (CastlingViT, _VIT),
    "vit-conv": (CastlingViT, dict(_VIT, **_PREFIX, stem="conv", patch_size=8, init_values=0.1)),
    "levit": (CastlingLeViT, dict(arch=LEVIT)),
    "mvit": (CastlingMViT, dict(arch=MVIT, img_size=64)),
    "mvit-unpooled": (CastlingMViT, dict(arch=MVIT, img_size=64, kv_pooling=False)),
}


def small(variant, attention="castling", *, attn_cfg=None, **options):
    backbone, defaults = VARIANTS[variant]
    attn_cfg = {"threshold": 1.0, "threshold_unit": "uniform", **(attn_cfg or {})}
    return backbone(**{**defaults, "attention": attention, "attn_cfg": attn_cfg, **options})


def randomised(model, seed=0):
    """Every parameter and statistic drawn anew, scaled so that the features stay of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value.copy_(noise.abs() + 0.5)
            elif name.endswith("attention_biases"):
                value.copy_(noise)
            elif value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                is_norm = name.endswith("weight") and ("bn." in name or "norm" in name)
                value.copy_(noise * 0.2 + is_norm)
    return model


def image(*size, batch=2, dtype=torch.float32, seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weighted_sum(maps):
    """A number that depends on every place of the maps, each in its own way."""
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in maps)
