"""Detectors for export: BatchNorm and layer scale folded into the layers before them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import ConvModule
from timm.layers import LayerScale
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from castling_det.layers import CastlingBlock, fuse_norms

__all__ = ["fuse_detector"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fuse_detector(model: nn.Module) -> None:
    """Folds norms and scales of a detector, or of a part of one, in place; parameters get other names.

    - BatchNorm into the convolution or linear layer before it: in LeViT, convolutional stems and mmcv's `ConvModule`. A
      convolution that pyramid levels share, with a norm for each level, becomes one convolution for each level.
    - The layer scale of a ViT block into the last linear layer of its branch.

    Raises:
        ValueError: a norm in training mode. Nothing is folded then.
    """
    training = [name for name, part in model.named_modules() if isinstance(part, _NORMS) and part.training]
    if training:
        raise ValueError(f"{training[0]}: is in training mode; call eval() on the model before its norms are fused")
    fuse_norms(model)
    for part in list(model.modules()):
        children = list(part.named_children())
        for (name, layer), (norm_name, norm) in pairwise(children if isinstance(part, nn.Sequential) else []):
            if type(layer) in (nn.Conv2d, nn.Linear) and isinstance(norm, _NORMS):
                setattr(part, name, _folded(layer, norm))
                setattr(part, norm_name, nn.Identity())
        if isinstance(part, ConvModule):
            _fuse_conv_module(part)
        elif isinstance(part, CastlingBlock):
            _fuse_layer_scale(part, "ls1", part.attn.proj)
            _fuse_layer_scale(part, "ls2", part.mlp.fc2)


def _folded(layer: Any, norm: Any) -> nn.Module:
    """A new layer, so that another module that shares the old one keeps it."""
    fused: nn.Module = (fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval)(layer, norm)
    return fused


def _fuse_conv_module(module: ConvModule) -> None:
    in_order = tuple(module.order).index("norm") == tuple(module.order).index("conv") + 1
    if in_order and module.with_norm and isinstance(module.norm, _NORMS) and type(module.conv) is nn.Conv2d:
        module.conv = _folded(module.conv, module.norm)
        delattr(module, module.norm_name)
        module.with_norm, module.norm_name, module.with_bias = False, None, True


@torch.no_grad()
def _fuse_layer_scale(block: CastlingBlock, name: str, linear: nn.Linear) -> None:
    scale = getattr(block, name)
    if isinstance(scale, LayerScale):
        linear.weight.mul_(scale.gamma[:, None])
        if linear.bias is not None:
            linear.bias.mul_(scale.gamma)
        setattr(block, name, nn.Identity())
