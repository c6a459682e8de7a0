"""MViTv2 for detection with castling attention in every block; parameter names are timm's MultiScaleVit's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from castling_det.layers import PooledAttention, PooledBlock
from castling_det.models.base import CastlingBackbone, init_linear_layers, resolved_architecture, resolved_indices
from castling_det.registry import MODELS

__all__ = ["ARCHITECTURES", "CastlingMViT", "MViTArchitecture"]


class MViTArchitecture(NamedTuple):
    """Blocks of each stage; channels, heads, and the pooling stride of keys and values in the first stage.

    Each further stage halves the map in its first block, doubles channels and heads, and halves the stride down to 1.
    """

    depths: tuple[int, ...]
    embed_dims: int = 96
    num_heads: int = 1
    stride_kv: int = 4


ARCHITECTURES = {
    "tiny": MViTArchitecture((1, 2, 5, 2)),
    "small": MViTArchitecture((1, 2, 11, 2)),
    "base": MViTArchitecture((2, 3, 16, 3)),
}

PATCH_STRIDE = 4


@MODELS.register_module()
class CastlingMViT(CastlingBackbone):
    """Multiscale vision transformer v2 (arXiv 2112.01526) as a detector's backbone: strides 4, 8, 16 and 32.

    Attention is over the whole map, between pooled queries, keys and values, with residual pooling. Each returned map
    passes a LayerNorm; these norms train even where all stages are frozen. Weights of `attention="castling"` load
    strictly into `"linear"`; `"softmax"` (equal to timm's MViTv2) also has tables of relative positions.

    Args:
        arch: `"tiny"`, `"small"`, `"base"`, or a dict with the fields of `MViTArchitecture`.
        kv_pooling: pool keys and values by MViTv2's strides. False: they keep the queries' grid, so that the linear
            branch is the published formula in every block, at a cost that is linear in the tokens.
        img_size: side, or (height, width), in pixels of the images of `"softmax"`'s relative positions, multiples of
            the last stride; interpolated for other sizes.
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether q, k, v have a bias.
        out_indices: stages whose output is returned, ascending; negative ones count from the last. Stages after the
            last of them are not built.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0, in [0, 1).
        attention, shared: see `CastlingBackbone`. MViTv2 files can be loaded.
    """

    stem_names = ("patch_embed",)

    def __init__(
        self,
        arch: str | dict[str, Any] = "tiny",
        *,
        attention: str = "castling",
        kv_pooling: bool = True,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(attention, **shared)
        depths, embed_dims, num_heads, stride_kv = resolved_architecture(arch, ARCHITECTURES, MViTArchitecture)
        if not depths or min(depths) < 1:
            raise ValueError(f"arch.depths={depths}: expected one block or more a stage")
        self.out_indices = resolved_indices(out_indices, len(depths))
        self.depths = depths[: self.out_indices[-1] + 1]
        self.size_divisor = PATCH_STRIDE * 2 ** (len(self.depths) - 1)
        self.out_channels = [embed_dims * 2**stage for stage in self.out_indices]
        self.out_strides = [PATCH_STRIDE * 2**stage for stage in self.out_indices]

        image_hw = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(image_hw) < 1 or any(side % self.size_divisor for side in image_hw):
            raise ValueError(f"img_size={img_size}: expected multiples of {self.size_divisor}, such as 224")
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(in_channels, embed_dims, 7, stride=PATCH_STRIDE, padding=3))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(self.depths):
            blocks = nn.ModuleList()
            for index in range(depth):
                halves = stage > 0 and index == 0
                stride_q = 2 if halves else 1
                dim = embed_dims * 2**stage
                grid_stride = PATCH_STRIDE * 2 ** (stage - halves)
                attn = PooledAttention(
                    dim // 2 if halves else dim,
                    num_heads * 2**stage,
                    dim_out=dim,
                    stride_q=stride_q,
                    stride_kv=max(stride_kv // 2**stage, 1) if kv_pooling else stride_q,
                    grid=(image_hw[0] // grid_stride, image_hw[1] // grid_stride),
                    qkv_bias=qkv_bias,
                    options=self.options,
                )
                blocks.append(PooledBlock(attn, mlp_ratio=mlp_ratio, drop_path=next(rates)))
            self.stages.append(nn.ModuleDict({"blocks": blocks}))
        for stage, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels, eps=1e-6))
        init_linear_layers(self.stages)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one map (B, C, H / stride, W / stride) for each out index."""
        x = self.patch_embed(self._checked_or_padded(x))
        hw = (x.shape[-2], x.shape[-1])
        tokens = x.flatten(2).transpose(1, 2)
        outputs = []
        for index, stage in enumerate(self.stages):
            # torch types an item of a ModuleList as Module.
            for block in stage["blocks"]:  # type: ignore[index]
                tokens, hw = self._run(block, tokens, hw)
            if index in self.out_indices:
                normed: Tensor = getattr(self, f"norm{index}")(tokens)
                outputs.append(normed.transpose(1, 2).unflatten(2, hw))
        return tuple(outputs)
