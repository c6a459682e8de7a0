"""Detectors for deployment: BatchNorm and layer scale folded into the layers before them, exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from mmcv.cnn import ConvModule
from timm.layers import LayerScale
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from castling_det.layers import CastlingBlock, fuse_norms
from castling_det.registry import MODELS

__all__ = ["FusedDetector", "fuse_detector"]

_Norm = (nn.BatchNorm1d, nn.BatchNorm2d)


@MODELS.register_module()  # type: ignore[untyped-decorator]
def FusedDetector(detector: str, **model: Any) -> nn.Module:  # a `type` in configs, as every class there
    """The detector of a model config after `fuse_detector`, to load a fused checkpoint into.

    For prediction only: where a norm was folded away, training is another one.

    Args:
        detector: `type` of the detector that the checkpoint was fused from.
        model: the rest of its config as it was, which its own constructor checks.
    """
    built: nn.Module = MODELS.build(dict(type=detector, **model))
    fuse_detector(built.eval())
    return built


def fuse_detector(model: nn.Module) -> dict[str, int]:
    """Folds, in place, what is constant in prediction into the layer before it; parameters are renamed by it.

    - BatchNorm after a convolution or a linear layer: of LeViT, of convolutional stems, of mmcv's `ConvModule` in necks
      and heads. A convolution that levels share while each has a norm of its own becomes one for each level.
    - The layer scale of a ViT block, into the last linear layer of its branch.

    Args:
        model: a detector or a part of one, in eval mode.

    Returns:
        How many were folded, by kind.

    Raises:
        ValueError: a norm in training mode. Nothing is folded then.
    """
    training = [name for name, part in model.named_modules() if isinstance(part, _Norm) and part.training]
    if training:
        raise ValueError(f"{training[0]}: is in training mode; call eval() on the model before its norms are fused")
    counts: Counter[str] = Counter()
    modules = list(model.modules())
    counts["LeViT norms"] = fuse_norms(model)
    for part in modules:
        if isinstance(part, ConvModule):
            counts["convolution modules"] += _fuse_conv_module(part)
        elif isinstance(part, nn.Sequential):
            counts["convolutions in sequence"] += _fuse_sequence(part)
        elif isinstance(part, CastlingBlock):
            counts["layer scales"] += _fuse_layer_scales(part)
    return {kind: count for kind, count in counts.items() if count}


def _folded(layer: Any, norm: nn.Module) -> nn.Module:
    fuse: Any = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
    folded: nn.Module = fuse(layer, norm)
    return folded


def _fuse_conv_module(module: ConvModule) -> int:
    norm = module.norm if module.with_norm else None
    in_order = tuple(module.order).index("norm") == tuple(module.order).index("conv") + 1
    if not in_order or not isinstance(norm, _Norm) or type(module.conv) is not nn.Conv2d:
        return 0
    # A new layer, so that another module that shares the old one keeps it.
    module.conv = _folded(module.conv, norm)
    delattr(module, module.norm_name)
    module.with_norm, module.norm_name, module.with_bias = False, None, True
    return 1


def _fuse_sequence(sequence: nn.Sequential) -> int:
    count = 0
    layers = list(sequence.named_children())
    for (name, layer), (norm_name, norm) in itertools.pairwise(layers):
        plain: Any = layer if type(layer) in (nn.Conv2d, nn.Linear) else None
        if plain is not None and isinstance(norm, _Norm):
            setattr(sequence, name, _folded(plain, norm))
            setattr(sequence, norm_name, nn.Identity())
            count += 1
    return count


def _fuse_layer_scales(block: CastlingBlock) -> int:
    count = 0
    for name, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
        scale = getattr(block, name)
        if isinstance(scale, LayerScale):
            with torch.no_grad():
                layer.weight.mul_(scale.gamma[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(scale.gamma)
            setattr(block, name, nn.Identity())
            count += 1
    return count
