"""What is called at each level, each as a module of one tensor, with a variant's attention in it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.analysis.benchmark.attentions import rebuilt, replace_attention
from castling_det.analysis.benchmark.options import PATCH_SIZE, BenchmarkOptions, Case
from castling_det.analysis.benchmark.variants import FLOOR, VARIANTS, Variant
from castling_det.config import load_config
from castling_det.layers import CastlingAttention, CastlingBlock, LocalConv

__all__ = ["Core", "Floor", "build_model", "detector_stride", "input_shape", "tokens_of"]


class Core(nn.Module):
    """`CastlingAttention.attend` alone."""

    def __init__(self, attn: CastlingAttention, hw: tuple[int, int]) -> None:
        super().__init__()
        self.attn = attn
        self.hw = hw

    def forward(self, qkv: Tensor) -> Tensor:
        """Packed q, k, v (B, N, 3 * C) to merged heads (B, N, C)."""
        return self.attn.attend(qkv, self.hw)


class Floor(nn.Module):
    """The products and the convolution that linear attention cannot do without, on operands that lie ready."""

    def __init__(self, attn: CastlingAttention, hw: tuple[int, int]) -> None:
        super().__init__()
        assert attn.dconv is not None
        self.num_heads, self.hw = attn.num_heads, hw
        self.weight = attn.dconv.weight

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Planes (4, B, N, C): the memory of q, k and v, (B, H, N, K) each, and of a channels-last map (B, C, ...)."""
        _, batch, tokens, dim = planes.shape
        q, k, v = planes[:3].view(3, batch, self.num_heads, tokens, dim // self.num_heads)
        image = planes[3].view(batch, *self.hw, dim).permute(0, 3, 1, 2)
        padding = self.weight.shape[2] // 2
        return q @ (k.transpose(-2, -1) @ v), F.conv2d(image, self.weight, padding=padding, groups=dim)


class OnMap(nn.Module):
    """A block on a token map of one size."""

    def __init__(self, block: CastlingBlock, hw: tuple[int, int]) -> None:
        super().__init__()
        self.block = block
        self.hw = hw

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.block(x, self.hw)  # type: ignore[no-any-return]


class RawOutputs(nn.Module):
    """A detector up to its head's maps; boxes are not decoded."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        """Images (B, 3, H, W) to whatever the head gives."""
        return self.detector(images, mode="tensor")


def build_model(case: Case, name: str, variant: Variant, options: BenchmarkOptions) -> nn.Module:
    """The module of `case` with the attention of `variant`; random weights, the same ones by name in every variant."""
    torch.manual_seed(0)
    model: nn.Module
    if case.level == "backbone":
        model = _backbone(case, options)
    elif case.level == "detector":
        model = RawOutputs(_detector(options.config_file(variant.options["mode"])))
    else:
        attn = CastlingAttention(options.embed_dims, options.num_heads)
        model = Core(attn, case.hw) if case.level == "core" else OnMap(CastlingBlock(attn), case.hw)
    replace_attention(model, lambda layer: rebuilt(layer, variant.attention, **variant.options))
    _randomise(model)
    _leave_out_chance(model)
    return Floor(model.attn, case.hw) if name == FLOOR and isinstance(model, Core) else model


def input_shape(case: Case, name: str, options: BenchmarkOptions) -> tuple[int, ...]:
    """Shape of what the module of `build_model` takes."""
    if case.level in ("backbone", "detector"):
        return case.batch, 3, case.height, case.width
    tokens, dim = case.height * case.width, options.embed_dims
    if name == FLOOR:
        return 4, case.batch, tokens, dim
    return case.batch, tokens, 3 * dim if case.level == "core" else dim


def tokens_of(case: Case, stride: int | None) -> int:
    """Length of the longest sequence; `stride` is the detector's, see `detector_stride`."""
    if case.level in ("core", "block"):
        return case.height * case.width
    pixels = PATCH_SIZE if case.level == "backbone" else stride
    assert pixels is not None
    return (case.height // pixels) * (case.width // pixels)


def detector_stride(options: BenchmarkOptions) -> int:
    """Smallest stride in pixels of the backbone's tokens.

    Raises:
        ValueError: a config that the variants need is not there, cannot be built, or has no backbone of this package.
    """
    modes = {VARIANTS[name].options["mode"] for name in options.variants if "detector" in VARIANTS[name].levels}
    strides = set()
    for mode in sorted(modes):
        backbone = getattr(_detector(options.config_file(mode)), "backbone", None)
        if not any(isinstance(module, CastlingAttention) for module in (backbone or nn.Module()).modules()):
            raise ValueError(
                f"--config-prefix {options.config_prefix}: {options.config_file(mode)} has no castling attention; "
                "expected detectors with a backbone of this package"
            )
        strides.add(min(backbone.out_strides))  # type: ignore[union-attr]
    return int(min(strides))


def _backbone(case: Case, options: BenchmarkOptions) -> nn.Module:
    from castling_det.models import CastlingViT

    # The position embedding at the size of the image: interpolating it is no part of what is compared.
    return CastlingViT(
        options.embed_dims, depth=options.depth, num_heads=options.num_heads, img_size=case.hw, patch_size=PATCH_SIZE
    )


def _detector(config_file: str) -> nn.Module:
    from mmdet.registry import MODELS
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    config = load_config(config_file)
    init_default_scope(config.get("default_scope") or "mmdet")
    try:
        model: nn.Module = revert_sync_batchnorm(MODELS.build(config.model))
    except Exception as error:  # Any class of any package builds here.
        raise ValueError(f"config {config_file}: its model cannot be built: {error}") from error
    return model


def _randomise(model: nn.Module) -> None:
    """Weights that keep the variance, biases and norms off their 0 and 1, which would hide a dropped one."""
    with torch.no_grad():
        for name, module in model.named_modules():
            noise = _noise(name)
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # As small as the unit vectors beside which it stands: a larger one would hide errors in them.
                heads = module.dim // module.num_heads if isinstance(module, LocalConv) else 1
                module.weight.copy_(noise(module.weight) * (module.weight[0].numel() * heads) ** -0.5)
            elif isinstance(weight, nn.Parameter) and weight.dim() == 1:
                weight.copy_(1 + 0.05 * noise(weight))
            if isinstance(bias, nn.Parameter):
                bias.copy_(0.05 * noise(bias))


def _noise(name: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return lambda like: torch.randn(like.shape, generator=generator)


def _leave_out_chance(model: nn.Module) -> None:
    """No dropout and no stochastic depth: two calls in training mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
