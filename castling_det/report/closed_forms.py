"""Multiply-adds of one call of a module, in closed form, by module type.

A multiply-add is one product that is added to a sum: matrix products and convolutions. What is done once an element
(norms, activations, scalings, additions, pooling, interpolation) counts zero and is listed here by name, so that a
module that is in no list is an error and not a zero.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from castling_det.layers import CastlingAttention, LevitAttention, PooledAttention

__all__ = ["Call", "ClosedForm", "closed_form", "register_closed_form", "uncounted"]

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments and output of a call."""

ClosedForm = Callable[[Any, Call], dict[str, int]]
"""Module and call to multiply-adds by kind."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_CLOSED_FORMS: dict[type[nn.Module] | str, ClosedForm] = {}

_FREE_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Embedding,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d, nn.ConstantPad2d,
    nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip

# By full name: these packages are not imported for the sake of a look-up.
_FREE_NAMES = frozenset({
    "mmcv.cnn.bricks.activation.Clamp",
    "mmcv.cnn.bricks.drop.DropPath",
    "mmcv.cnn.bricks.drop.Dropout",
    "mmcv.cnn.bricks.hsigmoid.HSigmoid",
    "mmcv.cnn.bricks.hswish.HSwish",
    "mmcv.cnn.bricks.scale.LayerScale",
    "mmcv.cnn.bricks.scale.Scale",
    "mmcv.cnn.bricks.swish.Swish",
    "mmcv.ops.roi_align.RoIAlign",
    "mmcv.ops.roi_pool.RoIPool",
    "mmdet.models.layers.positional_encoding.SinePositionalEncoding",
    "timm.layers.drop.DropPath",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.layer_scale.LayerScale2d",
})  # fmt: skip

# Parameters that a module with children adds, repeats or scales by, once an element.
_FREE_PARAMETERS = frozenset({"pos_embed", "cls_token", "reg_token", "absolute_pos_embed", "level_embed", "gamma"})

def register_closed_form(module_type: type[nn.Module] | str) -> Callable[[ClosedForm], ClosedForm]:
    """Decorator: the closed form of `module_type`, its subclasses included, all its children counted in it.

    A type is also given by its full name, `package.module.Class`: then its package is not imported.
    """

    def register(form: ClosedForm) -> ClosedForm:
        _CLOSED_FORMS[module_type] = form
        return form

    return register


def closed_form(module: nn.Module) -> ClosedForm | None:
    """The closed form of the nearest registered class of `module`, or None."""
    for base in type(module).__mro__:
        form = _CLOSED_FORMS.get(base) or _CLOSED_FORMS.get(f"{base.__module__}.{base.__qualname__}")
        if form is not None:
            return form
    return None


def uncounted(module: nn.Module) -> str | None:
    """What a module without a closed form does that no list says is free, in words; None if nothing."""
    name = type(module).__qualname__
    full_name = f"{type(module).__module__}.{name}"
    if isinstance(module, _FREE_TYPES) or full_name in _FREE_NAMES or type(module) in _CONTAINERS:
        return None
    if next(module.children(), None) is None:
        return name
    own = [parameter for parameter, _ in module.named_parameters(recurse=False) if parameter not in _FREE_PARAMETERS]
    return f"{name} (its {', '.join(own)})" if own else None


@register_closed_form(nn.Linear)
def _linear(module: nn.Linear, call: Call) -> dict[str, int]:
    return {"linear": math.prod(_first(call).shape[:-1]) * module.in_features * module.out_features}


@register_closed_form(nn.modules.conv._ConvNd)
def _convolution(module: nn.modules.conv._ConvNd, call: Call) -> dict[str, int]:
    """Outputs times kernel taps times input channels a group; taps that meet the padding are counted."""
    return {"conv": call[2].numel() * math.prod(module.kernel_size) * (module.in_channels // module.groups)}


@register_closed_form(nn.modules.conv._ConvTransposeNd)
def _transposed_convolution(module: nn.modules.conv._ConvTransposeNd, call: Call) -> dict[str, int]:
    """Inputs times kernel taps times output channels a group."""
    taps = math.prod(module.kernel_size)
    return {"conv": _first(call).numel() * taps * (module.out_channels // module.groups)}


@register_closed_form(CastlingAttention)
def _castling_attention(module: CastlingAttention, call: Call) -> dict[str, int]:
    batch, tokens, _ = _first(call).shape
    return {kind: batch * macs for kind, macs in module.macs(tokens).items()}


@register_closed_form(PooledAttention)
def _pooled_attention(module: PooledAttention, call: Call) -> dict[str, int]:
    hw = call[0][1] if len(call[0]) > 1 else call[1]["hw"]
    return {kind: len(_first(call)) * macs for kind, macs in module.macs(hw).items()}


@register_closed_form(LevitAttention)
def _levit_attention(module: LevitAttention, call: Call) -> dict[str, int]:
    hw = call[0][1] if len(call[0]) > 1 else call[1]["hw"]
    return {kind: len(_first(call)) * macs for kind, macs in module.macs(hw).items()}


@register_closed_form(nn.MultiheadAttention)
def _multihead_attention(module: nn.MultiheadAttention, call: Call) -> dict[str, int]:
    """q k^T and p v, N * M * C each; the projections of q, k, v and of the output."""
    names = ("query", "key", "value")
    query, key, value = (call[0] + tuple(call[1][name] for name in names if name in call[1]))[:3]
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("MultiheadAttention: add_bias_kv and add_zero_attn have no closed form here")
    rows = math.prod(query.shape[:-1])
    sources = key.shape[module.batch_first if key.dim() == 3 else 0]
    products = rows * sources * module.embed_dim
    inputs = rows * module.embed_dim + math.prod(key.shape) + math.prod(value.shape)
    return {
        "attention_scores": products,
        "attention_values": products,
        "projections": (inputs + rows * module.embed_dim) * module.embed_dim,
    }


@register_closed_form("mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention")
def _deformable_attention(module: Any, call: Call) -> dict[str, int]:
    """Each query takes L * P samples in each head, M channels over all heads: 4 neighbours each, and a weighted sum.

    Offsets (two a sample) and weights (one) are projections of the query; nothing is compared with a key.
    """
    bound = inspect.signature(module.forward).bind(*call[0], **call[1]).arguments
    query = bound["query"]
    value = query if bound.get("value") is None else bound["value"]
    queries, values = math.prod(query.shape[:-1]), math.prod(value.shape[:-1])
    width = module.value_proj.out_features
    samples = module.num_heads * module.num_levels * module.num_points
    weights_and_offsets = queries * module.embed_dims * 3 * samples
    return {
        "projections": (values + queries) * module.embed_dims * width + weights_and_offsets,
        "attention_values": 5 * queries * module.num_levels * module.num_points * width,
    }


def _first(call: Call) -> Tensor:
    arguments, keywords, _ = call
    tensor = arguments[0] if arguments else next(iter(keywords.values()))
    assert isinstance(tensor, Tensor)
    return tensor
