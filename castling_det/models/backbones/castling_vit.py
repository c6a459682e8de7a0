"""A plain ViT for detection with castling attention in every block; parameter names are timm's VisionTransformer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from castling_det.layers import ATTENTION_MODES, CastlingAttention, CastlingBlock, ConvStem
from castling_det.registry import MODELS

__all__ = ["CastlingViT"]

STEMS = ("patch", "conv")


@MODELS.register_module()
class CastlingViT(BaseModule):
    """Plain vision transformer (arXiv 2010.11929) as a detector's backbone, one stride, attention over the whole map.

    The same parameters serve every `attention`: a state dict of one mode loads strictly into another.

    Args:
        embed_dims: channels C of the tokens.
        depth: number of blocks.
        num_heads: heads, dividing `embed_dims`.
        attention: `"softmax"` (baseline), `"castling"` (hybrid while training) or `"linear"` (what is deployed).
        normalizer: `"l2"` (published) or `"kernel"`, of the linear branch.
        center_keys: take the mean over the tokens from the keys of the linear branch; published False.
        local_conv: `"image"`, `"tokens"` (published) or None; the depthwise convolution on the values in every mode.
        local_conv_kernel_size: odd kernel size of `local_conv="image"`.
        threshold: start value of the mask, in `threshold_unit`; `MaskAnnealingHook` moves it.
        threshold_unit: `"absolute"` (published) or `"uniform"`, multiples of 1/N.
        eval_aux: keep the softmax branch of `"castling"` in eval mode, to measure the gap.
        img_size: side, or (height, width), in pixels of the grid that `pos_embed` is kept at; others interpolate it.
        patch_size: stride of the tokens in pixels; with `stem="conv"` a power of two, 8 or 16.
        stem: `"patch"` (one convolution of kernel = stride) or `"conv"` (3x3 convolutions of stride 2).
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over `embed_dims`.
        qkv_bias: whether q, k, v have a bias.
        with_cls_token: prepend a class token. It joins the attention and is dropped from the features.
        num_reg_tokens: further prefix tokens (DINOv2 registers), dropped likewise.
        init_values: initial layer scale (DINOv2: 1e-5), or None for none.
        window_size: side in tokens of the windows that `"softmax"` attends in (ViTDet: 14), a second baseline; 0: whole
            map. Linear attention needs no windows and takes none.
        global_indices: blocks that attend over the whole map all the same (ViTDet of 12 blocks: 2, 5, 8, 11).
        final_norm: LayerNorm on every feature map that is returned.
        out_indices: blocks whose output is returned, ascending; negative ones count from the last.
        drop_rate: dropout after the position embedding, the projections and in the MLPs, in [0, 1).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0, in [0, 1).
        frozen_stages: -1 trains all; 0 freezes stem and position embedding; n freezes the first n blocks too.
        with_cp: recompute each block in backward to save memory (not re-entrant, so that it works under DDP).
        pad_input: pad right and bottom with zeros to a multiple of `patch_size`. False raises instead: padding
            belongs to `data_preprocessor=dict(pad_size_divisor=...)`, which tells the head about it.
        init_cfg: mmengine's; `dict(type="castling_det.Pretrained", checkpoint=FILE)` reads a timm, DeiT or DINOv2 file.

    Attributes:
        out_channels: channels of each returned map. out_strides: stride of each in pixels.
    """

    def __init__(
        self,
        embed_dims: int = 384,
        *,
        depth: int = 12,
        num_heads: int = 6,
        attention: str = "castling",
        normalizer: str = "l2",
        center_keys: bool = False,
        local_conv: str | None = "image",
        local_conv_kernel_size: int = 3,
        threshold: float = 0.02,
        threshold_unit: str = "absolute",
        eval_aux: bool = False,
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
        frozen_stages: int = -1,
        with_cp: bool = False,
        pad_input: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTION_MODES))}")
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r}: expected one of {', '.join(map(repr, STEMS))}")
        if not -1 <= frozen_stages <= depth:
            raise ValueError(f"frozen_stages={frozen_stages}: expected -1 (none) to depth={depth}")
        if window_size and attention != "softmax":
            raise ValueError(
                f"window_size={window_size}: only attention='softmax' has windows, got {attention!r}; "
                "linear attention costs the same over the whole map, set window_size=0"
            )
        if not set(global_indices) <= set(range(depth)):
            raise ValueError(f"global_indices={tuple(global_indices)}: expected block indices in [0, {depth})")
        self.embed_dims = embed_dims
        self.attention = attention
        self.patch_size = patch_size
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.pad_input = pad_input
        self.num_prefix_tokens = int(with_cls_token) + num_reg_tokens
        self.out_indices = _resolved_out_indices(out_indices, depth)
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
        # Patches only: a class token's own parameter takes up its position, which is the same function.
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
                    mode=attention,
                    normalizer=normalizer,
                    center_keys=center_keys,
                    local_conv=local_conv,
                    local_conv_kernel_size=local_conv_kernel_size,
                    threshold=threshold,
                    threshold_unit=threshold_unit,
                    eval_aux=eval_aux,
                    num_prefix_tokens=self.num_prefix_tokens,
                    proj_drop=drop_rate,
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
        self._init_parameters()
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one map (B, C, H / patch_size, W / patch_size) for each out index."""
        x = self._checked_or_padded(x)
        x = self.stem(x) if hasattr(self, "stem") else self.patch_embed(x)
        hw = (x.shape[-2], x.shape[-1])
        tokens = x.flatten(2).transpose(1, 2) + self._position_embedding(hw)
        tokens = self.pos_drop(self._with_prefix(tokens))
        outputs = []
        for index, block in enumerate(self.blocks):
            if self.with_cp and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, hw, use_reentrant=False)
            else:
                tokens = block(tokens, hw)
            if index in self.out_indices:
                outputs.append(self._feature_map(tokens, hw))
        return tuple(outputs)

    def train(self, mode: bool = True) -> CastlingViT:
        """As nn.Module's; frozen stages stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: full name, such as `backbone.blocks.3.attn.qkv.weight`.
            prefix: what stands before this module's own names, such as `backbone.`.

        Returns:
            Layer id and number of layers: 0 for stem, tokens and position embedding, 1 to depth for the blocks,
            depth + 1 for what comes after them, of depth + 2 layers.
        """
        num_layers = len(self.blocks) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name = param_name[len(prefix) :]
        if name.startswith(("stem.", "patch_embed.")) or name in ("pos_embed", "cls_token", "reg_token"):
            return 0, num_layers
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def _checked_or_padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        stride = self.patch_size
        if not self.pad_input and min(height, width) < stride:
            raise ValueError(
                f"image of {height} x {width} pixels: expected at least patch_size={stride} a side; resize it"
            )
        pad_h, pad_w = -height % stride, -width % stride
        if pad_h == pad_w == 0:
            return x
        if not self.pad_input:
            raise ValueError(
                f"image of {height} x {width} pixels: expected multiples of patch_size={stride}; set "
                f"data_preprocessor.pad_size_divisor={stride} in the config, or pad_input=True in the backbone"
            )
        return F.pad(x, (0, pad_w, 0, pad_h))

    def _position_embedding(self, hw: tuple[int, int]) -> Tensor:
        # An exported program of all sizes would refuse this one, if it left here.
        if not any(isinstance(side, torch.SymInt) for side in hw) and hw == self.pos_grid:
            return self.pos_embed
        return resample_abs_pos_embed(  # type: ignore[no-any-return]
            self.pos_embed, new_size=list(hw), old_size=list(self.pos_grid), num_prefix_tokens=0
        )

    def _with_prefix(self, tokens: Tensor) -> Tensor:
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if not prefix:
            return tokens
        return torch.cat([token.expand(tokens.shape[0], -1, -1) for token in prefix] + [tokens], dim=1)

    def _feature_map(self, tokens: Tensor, hw: tuple[int, int]) -> Tensor:
        patches: Tensor = self.norm(tokens[:, self.num_prefix_tokens :])
        return patches.transpose(1, 2).reshape(tokens.shape[0], self.embed_dims, *hw)

    def _init_parameters(self) -> None:
        for name in ("pos_embed", "cls_token", "reg_token"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        embedding = self.patch_embed if hasattr(self, "patch_embed") else self.stem
        return [embedding, self.pos_drop, *self.blocks[: self.frozen_stages]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name in ("pos_embed", "cls_token", "reg_token"):
                if hasattr(self, name):
                    getattr(self, name).requires_grad_(False)


def _resolved_out_indices(out_indices: Sequence[int], depth: int) -> tuple[int, ...]:
    resolved = tuple(index + depth if index < 0 else index for index in out_indices)
    if not resolved or list(resolved) != sorted(set(resolved)) or resolved[0] < 0 or resolved[-1] >= depth:
        raise ValueError(
            f"out_indices={tuple(out_indices)}: expected ascending, different block indices in [0, {depth}) "
            f"(depth={depth}), or negative ones counted from the last"
        )
    return resolved
