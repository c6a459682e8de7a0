"""LeViT for detection with castling attention in every block; parameter names are timm's Levit's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from castling_det.layers import LevitAttention, LevitBlock, LevitDownsample, LevitStage, LevitStem
from castling_det.models.base import CastlingBackbone, resolved_architecture, resolved_indices
from castling_det.registry import MODELS

__all__ = ["ARCHITECTURES", "CastlingLeViT", "LeViTArchitecture"]


class LeViTArchitecture(NamedTuple):
    """Channels, heads and blocks of each stage, and the width of a head's keys in all of them.

    Values are twice as wide. The attention between stages, which subsamples, has C / key_dim heads for the C channels
    before it, and values four times as wide as keys.
    """

    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    key_dim: int


ARCHITECTURES = {
    "128S": LeViTArchitecture((128, 256, 384), (4, 6, 8), (2, 3, 4), 16),
    "128": LeViTArchitecture((128, 256, 384), (4, 8, 12), (4, 4, 4), 16),
    "192": LeViTArchitecture((192, 288, 384), (3, 5, 6), (4, 4, 4), 32),
    "256": LeViTArchitecture((256, 384, 512), (4, 6, 8), (4, 4, 4), 32),
    "384": LeViTArchitecture((384, 512, 768), (6, 9, 12), (4, 4, 4), 32),
}

_STEM_STRIDE = 16


@MODELS.register_module()
class CastlingLeViT(CastlingBackbone):
    """LeViT (arXiv 2104.01136) as a detector's backbone: strides 8, 16, 32 and 64, attention over the whole map.

    The map of stride 8 is the third convolution of the stem, after its activation; the others are the outputs of the
    stages, residual sums without a norm. Images may have any size; maps have ceil(size / stride) rows and columns.

    Weights of `attention="castling"` load strictly into `"linear"`; `"softmax"` (equal to timm's Levit) also has tables
    of position biases. `castling_det.layers.LevitAttention` says what stands in their place.

    Args:
        arch: `"128S"`, `"128"`, `"192"`, `"256"`, `"384"`, or a dict with the fields of `LeViTArchitecture`.
        img_size: side in pixels of the square images of `"softmax"`'s biases; interpolated for other sizes.
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over the channels.
        out_indices: which of the strides 8, 16, 32 and 64 are returned, ascending; negative ones count from the last.
            Stages after the last of them are not built, so it must be one of the stages.
        drop_path_rate: stochastic depth of every residual branch, in [0, 1); LeViT-384 is pre-trained with 0.1.
        attention, shared: see `CastlingBackbone`. LeViT files of timm and of its authors can be loaded.
    """

    stem_names = ("stem",)

    def __init__(
        self,
        arch: str | dict[str, Any] = "128S",
        *,
        attention: str = "castling",
        img_size: int = 224,
        in_channels: int = 3,
        mlp_ratio: float = 2.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(attention, **shared)
        dims, heads, depths, key_dim = architecture = resolved_architecture(arch, ARCHITECTURES, LeViTArchitecture)
        _check_architecture(architecture)
        self.out_indices = resolved_indices(out_indices, len(depths) + 1, lowest_last=1)
        if img_size < _STEM_STRIDE:
            raise ValueError(f"img_size={img_size}: expected at least {_STEM_STRIDE} pixels, such as 224")
        self.out_channels = [[dims[0] // 2, *dims][index] for index in self.out_indices]
        self.out_strides = [_STEM_STRIDE // 2 * 2**index for index in self.out_indices]
        self.size_divisor = self.out_strides[-1]

        attention_of = partial(LevitAttention, key_dim=key_dim, options=self.options)
        branches: dict[str, Any] = dict(mlp_ratio=mlp_ratio, drop_path=drop_path_rate)
        self.stem = LevitStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        resolution = img_size // _STEM_STRIDE
        for stage, dim in enumerate(dims[: self.out_indices[-1]]):
            downsample = None
            if stage:
                before = dims[stage - 1]
                attn = attention_of(
                    before, dim, num_heads=before // key_dim, attn_ratio=4.0, query_stride=2, resolution=resolution
                )
                downsample = LevitDownsample(attn, dim, **branches)
                resolution = -(-resolution // 2)
            blocks = []
            for _ in range(depths[stage]):
                attn = attention_of(dim, dim, num_heads=heads[stage], attn_ratio=2.0, resolution=resolution)
                blocks.append(LevitBlock(attn, **branches))
            self.stages.append(LevitStage(downsample, blocks, with_cp=self.with_cp))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one map (B, C, ceil(H / stride), ceil(W / stride)) an out index."""
        fine, x = self.stem(self._checked_or_padded(x) if self.pad_input else x)
        maps = [fine]
        hw = (x.shape[-2], x.shape[-1])
        tokens = x.flatten(2).transpose(1, 2)
        for stage in self.stages:
            tokens, hw = stage(tokens, hw)
            maps.append(tokens.transpose(1, 2).unflatten(2, hw))
        return tuple(maps[index] for index in self.out_indices)


def _check_architecture(arch: LeViTArchitecture) -> None:
    if not len(arch.embed_dims) == len(arch.num_heads) == len(arch.depths) > 0:
        raise ValueError(f"arch={arch}: expected one number a stage in each of embed_dims, num_heads, depths")
    if arch.embed_dims[0] % 8 or any(dim < arch.key_dim for dim in arch.embed_dims[:-1]):
        raise ValueError(
            f"arch.embed_dims={arch.embed_dims}: expected the first to be a multiple of 8 (for the stem), and all but "
            f"the last to be at least key_dim={arch.key_dim} (for the heads between stages)"
        )
