"""A plain ViT for detection with castling attention in every block; parameter names are timm's VisionTransformer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from castling_det.layers import CastlingAttention, CastlingBlock, ConvStem
from castling_det.models.base import CastlingBackbone, init_linear_layers, resolved_indices
from castling_det.registry import MODELS

__all__ = ["CastlingViT"]

STEMS = ("patch", "conv")


@MODELS.register_module()
class CastlingViT(CastlingBackbone):
    """Plain vision transformer (arXiv 2010.11929) as a detector's backbone, one stride, attention over the whole map.

    A state dict of one `attention` loads strictly into another.

    Args:
        embed_dims, depth, num_heads: channels of the tokens, blocks, and heads, which divide the channels.
        img_size: side, or (height, width), in pixels, that `pos_embed` is made for; interpolated for other sizes.
        patch_size: stride of the tokens in pixels; with `stem="conv"` a power of two, 8 or 16.
        stem: `"patch"` (one convolution of kernel = stride) or `"conv"` (3x3 convolutions of stride 2).
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over `embed_dims`.
        qkv_bias: whether q, k, v have a bias.
        with_cls_token: prepend a class token. It joins the attention and is dropped from the features.
        num_reg_tokens: further tokens of this kind (DINOv2's registers).
        init_values: initial layer scale (DINOv2: 1e-5), or None for none.
        window_size: side in tokens of ViTDet's windows (14), for `"softmax"` alone, a second baseline. 0: whole map.
        global_indices: blocks without windows (ViTDet of 12 blocks: 2, 5, 8, 11).
        final_norm: LayerNorm on every returned map.
        out_indices: blocks whose output is returned, ascending; negative ones count from the last.
        drop_rate: dropout after the position embedding, the projections and in the MLPs, in [0, 1).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0, in [0, 1).
        attention, shared: see `CastlingBackbone`. timm, DeiT and DINOv2 files can be loaded.
    """

    stem_names = ("stem", "patch_embed", "pos_embed", "cls_token", "reg_token", "pos_drop")

    def __init__(
        self,
        embed_dims: int = 384,
        *,
        depth: int = 12,
        num_heads: int = 6,
        attention: str = "castling",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stem: str = "patch",
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        with_cls_token: bool = False,
        num_reg_tokens: int = 0,
        init_values: float | None = None,
        window_size: int = 0,
        global_indices: Sequence[int] = (),
        final_norm: bool = True,
        out_indices: Sequence[int] = (-1,),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(attention, **shared)
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r}: expected one of {', '.join(map(repr, STEMS))}")
        if window_size and attention != "softmax":
            raise ValueError(
                f"window_size={window_size}: only attention='softmax' has windows, got {attention!r}; "
                "linear attention costs the same over the whole map, set window_size=0"
            )
        if not set(global_indices) <= set(range(depth)):
            raise ValueError(f"global_indices={tuple(global_indices)}: expected block indices in [0, {depth})")
        self.embed_dims = embed_dims
        self.patch_size = self.size_divisor = patch_size
        self.num_prefix_tokens = int(with_cls_token) + num_reg_tokens
        self.out_indices = resolved_indices(out_indices, depth)
        self.out_channels = [embed_dims] * len(self.out_indices)
        self.out_strides = [patch_size] * len(self.out_indices)

        image_hw = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.pos_grid = (image_hw[0] // patch_size, image_hw[1] // patch_size)
        if min(self.pos_grid) < 1:
            raise ValueError(f"img_size={img_size}: expected at least patch_size={patch_size} pixels a side")
        if stem == "conv":
            self.stem = ConvStem(in_channels, embed_dims, stride=patch_size)
        else:
            self.patch_embed = nn.Sequential()
            self.patch_embed.add_module("proj", nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size))
        # One vector for each patch. The class token has none: its own parameter can take up a position.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.pos_grid[0] * self.pos_grid[1], embed_dims))
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        if num_reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, num_reg_tokens, embed_dims))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            CastlingBlock(
                CastlingAttention(
                    embed_dims,
                    num_heads,
                    qkv_bias=qkv_bias,
                    num_prefix_tokens=self.num_prefix_tokens,
                    proj_drop=drop_rate,
                    options=self.options,
                ),
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                window_size=0 if index in global_indices else window_size,
                drop=drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6) if final_norm else nn.Identity()
        for parameter in self._existing("pos_embed", "cls_token", "reg_token"):
            nn.init.trunc_normal_(parameter, std=0.02)
        init_linear_layers(self.blocks)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one map (B, C, H / patch_size, W / patch_size) for each out index."""
        x = self._checked_or_padded(x)
        x = self.stem(x) if hasattr(self, "stem") else self.patch_embed(x)
        hw = (x.shape[-2], x.shape[-1])
        patches = x.flatten(2).transpose(1, 2) + self._position_embedding(hw)
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._existing("cls_token", "reg_token")]
        tokens = self.pos_drop(torch.cat([*prefix, patches], dim=1) if prefix else patches)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = self._run(block, tokens, hw)
            if index in self.out_indices:
                outputs.append(self.norm(tokens[:, self.num_prefix_tokens :]).transpose(1, 2).unflatten(2, hw))
        return tuple(outputs)

    def _stages(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _position_embedding(self, hw: tuple[int, int]) -> Tensor:
        # A program that is exported for all sizes must not stop here: it would be tied to the size of `pos_grid`.
        if not any(isinstance(side, torch.SymInt) for side in hw) and hw == self.pos_grid:
            return self.pos_embed
        return resample_abs_pos_embed(  # type: ignore[no-any-return]
            self.pos_embed, new_size=list(hw), old_size=list(self.pos_grid), num_prefix_tokens=0
        )
