"""The attentions that tools/benchmarks/attention.py compares, in modules of one input, and their reference."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from castling_det.layers import CastlingAttention, CastlingBlock
from castling_det.ops import MaskedSoftmax, linear_angular_attention, naive

__all__ = ["CONFIG", "LEVELS", "PASSES", "VARIANTS", "Call", "build_call", "reference_of"]

LEVELS = ("core", "block", "backbone", "detector")
"""What is called: attention between its projections, a transformer block, a ViT, a detector without box decoding."""
PASSES = ("forward", "forward+backward")
CONFIG = ("configs/castling_vit/gfl_castling-vit-nano", "_8xb16-100e_coco.py")
"""Before and after the mode in the names of the detector's configs."""
PATCH_SIZE = 16


class NaiveAttention(CastlingAttention):
    """The reference: any mode by the naive operators, some queries at a time."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """Packed q, k, v (B, N, 3 * C) to merged heads (B, N, C), as in the base class."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        rows = max(1, 2**23 // (k.shape[0] * k.shape[1] * k.shape[2]))
        blocks = zip(q.split(rows, dim=2), v.split(rows, dim=2), strict=True)
        # Recomputed in backward: all blocks together would be N x N.
        y = torch.cat([checkpoint(self._rows, block, k, v, own, use_reentrant=False) for block, own in blocks], dim=2)
        out = y.transpose(1, 2).flatten(-2)
        return out if self.dconv is None else out + self.dconv(qkv[..., 2 * self.dim :], hw)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor) -> Tensor:
        if self.mode == "softmax":
            return naive.masked_softmax(q, k, v, -1.0).out  # every probability is above this threshold
        hybrid = self.mode == "castling" and self.training
        aux = naive.masked_softmax(q, k, v, self.mask_state.absolute(k.shape[2])) if hybrid else None
        return naive.linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux, v_at_q=own)


class PublishedAttention(CastlingAttention):
    """Linear mode as the published block computes it: permuted q, k, v, norms without eps, no 1/N."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class's with `normalizer="l2"` and `local_conv="tokens"`."""
        assert self.dconv is not None
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        x = 0.5 * v + 1.0 / math.pi * torch.matmul(q, torch.matmul(k.transpose(-2, -1), v))
        x = x / x.norm(dim=-1, keepdim=True)
        x = x + F.conv2d(v, self.dconv.weight, padding=(4, 0), groups=self.num_heads)
        merged: Tensor = x.transpose(1, 2).reshape(batch, tokens, self.dim)
        return merged


class DenseAttention(CastlingAttention):
    """Castling mode with the softmax branch as plain tensor operations: autograd keeps N x N tensors."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class's, always with the softmax branch."""
        assert self.dconv is not None
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        p = torch.softmax(q.shape[-1] ** -0.5 * (q @ k.transpose(-2, -1)), dim=-1)
        mask = p > self.mask_state.absolute(p.shape[-1])
        aux = MaskedSoftmax((p * mask) @ v, (p * mask).sum(dim=-1), mask.float().mean())
        y = linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux)
        local: Tensor = self.dconv(qkv[..., 2 * self.dim :], hw)
        return y.transpose(1, 2).flatten(-2) + local


@dataclass(frozen=True)
class Variant:
    """What takes the place of each attention layer."""

    options: Mapping[str, Any]
    attention: type[CastlingAttention] = CastlingAttention
    masked: bool = False
    """Entries lie at the threshold of a mask: rounding decides about some of them."""
    max_tokens: int | None = None


_HYBRID = {"mode": "castling", "threshold": 1.0, "threshold_unit": "uniform"}
VARIANTS: dict[str, Variant] = {
    # Without the local convolution that this package gives its softmax mode: nothing slows the baseline.
    "softmax": Variant({"mode": "softmax", "local_conv": None}),
    "linear": Variant({"mode": "linear"}),
    "castling": Variant(_HYBRID, masked=True),
    "castling_empty": Variant({**_HYBRID, "threshold_unit": "absolute"}),
    "published": Variant({"mode": "linear", "local_conv": "tokens"}, PublishedAttention),
    "dense": Variant(_HYBRID, DenseAttention, masked=True, max_tokens=4096),
    # The products and the convolution that linear attention cannot do without; the core's forward alone.
    "floor": Variant({"mode": "linear"}),
}


class Call:
    """One pass of a module; calling it returns the output tensors."""

    def __init__(self, module: nn.Module, x: Tensor, *, backward: bool, cotangents: list[Tensor] | None = None) -> None:
        self.module, self.backward, self.cotangents = module, backward, cotangents
        self.x = x.requires_grad_(backward)

    def __call__(self) -> list[Tensor]:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(self.backward):
            outputs = [leaf for leaf in tree_leaves(self.module(self.x)) if isinstance(leaf, Tensor)]
        if self.backward:
            if self.cotangents is None:  # random: the sum of a normalised vector is constant
                self.cotangents = [torch.randn_like(output) for output in outputs]
            torch.autograd.backward(outputs, self.cotangents)
        return outputs

    def gradients(self) -> list[Tensor]:
        """Of the input, and of the first attention layer's qkv, or its convolution where the pass uses no qkv."""
        found = [self.x.grad]
        for layer in list(_attentions(self.module).values())[:1]:
            found += [layer.qkv.weight.grad, None if layer.dconv is None else layer.dconv.weight.grad]
        return [gradient for gradient in found if gradient is not None]


class Core(nn.Module):
    """`CastlingAttention.attend` alone, on packed q, k, v."""

    def __init__(self, attn: CastlingAttention, hw: tuple[int, int]) -> None:
        super().__init__()
        self.attn, self.hw = attn, hw

    def forward(self, qkv: Tensor) -> Tensor:
        return self.attn.attend(qkv, self.hw)


class Floor(Core):
    """The bare products and the convolution, on operands (4, B, N, C) that lie ready."""

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        _, batch, tokens, dim = planes.shape
        q, k, v = planes[:3].view(3, batch, self.attn.num_heads, tokens, -1)
        image = planes[3].view(batch, *self.hw, dim).permute(0, 3, 1, 2)
        assert self.attn.dconv is not None
        return q @ (k.transpose(-2, -1) @ v), F.conv2d(image, self.attn.dconv.weight, padding=1, groups=dim)


class OneInput(nn.Module):
    """A module whose other arguments are fixed."""

    def __init__(self, module: nn.Module, *arguments: Any, **keywords: Any) -> None:
        super().__init__()
        self.module, self.arguments, self.keywords = module, arguments, keywords

    def forward(self, x: Tensor) -> Any:
        return self.module(x, *self.arguments, **self.keywords)


def _attentions(model: nn.Module) -> dict[str, CastlingAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CastlingAttention)}


def _built(
    level: str, name: str, hw: tuple[int, int], options: argparse.Namespace
) -> tuple[nn.Module, tuple[int, ...], int]:
    """The module, the shape of one input, and the tokens of its longest sequence."""
    variant, dim, tokens = VARIANTS[name], options.embed_dims, hw[0] * hw[1]
    if level in ("core", "block"):
        attn = variant.attention(dim, options.num_heads, **variant.options)
        if level == "block":
            return OneInput(CastlingBlock(attn), hw), (options.batch, tokens, dim), tokens
        if name == "floor":
            return Floor(attn, hw), (4, options.batch, tokens, dim), tokens
        return Core(attn, hw), (options.batch, tokens, 3 * dim), tokens
    if level == "backbone":
        from castling_det.models import CastlingViT

        # The position embedding at the size of the image: interpolating it is no part of the comparison.
        model: Any = CastlingViT(
            dim, depth=options.depth, num_heads=options.num_heads, img_size=hw, patch_size=PATCH_SIZE
        )
        stride = PATCH_SIZE
    else:
        from castling_det.config import load_config
        from castling_det.conversion.detectors import build_detector

        file = f"{options.config_prefix}_{variant.options['mode']}{options.config_suffix}"
        detector = build_detector(load_config(file))
        model, stride = OneInput(detector, mode="tensor"), min(detector.backbone.out_strides)  # type: ignore[union-attr, arg-type]
    for path, layer in _attentions(model).items():
        new = variant.attention(
            layer.dim, layer.num_heads, num_prefix_tokens=layer.num_prefix_tokens, **variant.options
        )
        model.set_submodule(path, new)
    return model, (options.batch, 3, *hw), (hw[0] // stride) * (hw[1] // stride)


def _randomised(model: nn.Module) -> nn.Module:
    """Weights that keep the variance; biases and norms off 0 and 1, which would hide a dropped one. No dropout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1 if name.endswith("weight") else 0, 0.05)
            if name.endswith("dconv.weight"):  # as small as the unit vectors beside which it stands
                parameter.mul_(0.2)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def build_call(
    level: str, name: str, passes: str, dtype: str, hw: tuple[int, int], options: argparse.Namespace
) -> tuple[Call, int]:
    torch.manual_seed(0)
    model, shape, tokens = _built(level, name, hw, options)
    backward = passes == "forward+backward"
    model = _randomised(model).train(backward).to(options.device, getattr(torch, dtype))
    for layer in _attentions(model).values():
        layer.train(layer.mode == "castling" or backward)
    x = torch.randn(shape).to(options.device, getattr(torch, dtype))
    return Call(model, x, backward=backward), tokens


def reference_of(call: Call, *, backward: bool) -> Call:
    """The same call in float64, of the same weights, input and output gradients, by the naive operators."""
    twin = copy.deepcopy(call.module).double()
    for layer in _attentions(twin).values():
        layer.__class__ = NaiveAttention  # its parameters and options are those of any CastlingAttention
    cotangents = [cotangent.double() for cotangent in call.cotangents or []]
    return Call(twin, call.x.detach().double(), backward=backward, cotangents=cotangents)
