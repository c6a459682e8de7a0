"""MViTv2 for detection with castling attention in every block; parameter names are timm's MultiScaleVit's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from castling_det.layers import ATTENTION_MODES, PooledAttention, PooledBlock
from castling_det.registry import MODELS

__all__ = ["ARCHITECTURES", "CastlingMViT", "MViTArchitecture"]


class MViTArchitecture(NamedTuple):
    """Four visible numbers of an MViTv2."""

    depths: tuple[int, ...]
    """Blocks of each stage; the first of a stage, save the first stage's, halves the map."""
    embed_dims: int = 96
    """Channels of the first stage; each further stage doubles them."""
    num_heads: int = 1
    """Heads of the first stage; each further stage doubles them."""
    stride_kv: int = 4
    """Pooling stride of keys and values in the first stage; each further stage halves it, down to 1."""


ARCHITECTURES = {
    "tiny": MViTArchitecture((1, 2, 5, 2)),
    "small": MViTArchitecture((1, 2, 11, 2)),
    "base": MViTArchitecture((2, 3, 16, 3)),
}

PATCH_STRIDE = 4


@MODELS.register_module()
class CastlingMViT(BaseModule):
    """Multiscale vision transformer v2 (arXiv 2112.01526) as a detector's backbone: strides 4, 8, 16 and 32.

    Attention is over the whole map, between pooled queries, keys and values, with residual pooling; there are no
    windows. A LayerNorm stands on each map that is returned. Weights of `attention="castling"` load strictly into
    `"linear"`; `"softmax"` (the baseline, equal to timm's MViTv2) has the tables of relative positions besides.

    Args:
        arch: `"tiny"`, `"small"`, `"base"`, or a dict with the fields of `MViTArchitecture`.
        attention: `"softmax"` (baseline), `"castling"` (hybrid while training) or `"linear"` (what is deployed).
        kv_pooling: pool keys and values by MViTv2's strides. False: they keep the queries' grid, so that the linear
            branch is the published formula in every block, at a cost that is linear in the tokens.
        normalizer: `"l2"` (published) or `"kernel"`, of the linear branch.
        center_keys: take the mean over the tokens from the keys of the linear branch; published False.
        local_conv: `"image"`, `"tokens"` (published) or None; the depthwise convolution on the values in every mode.
        local_conv_kernel_size: odd kernel size of `local_conv="image"`.
        threshold: start value of the mask, in `threshold_unit`; `MaskAnnealingHook` moves it.
        threshold_unit: `"absolute"` (published) or `"uniform"`, multiples of one over the number of keys.
        eval_aux: keep the softmax branch of `"castling"` in eval mode, to measure the gap.
        img_size: side, or (height, width), in pixels, multiples of the stride of the last stage, that the relative
            positions of `"softmax"` are kept at; others interpolate them.
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether q, k, v have a bias.
        out_indices: stages whose output is returned, ascending; negative ones count from the last. Stages after the
            last of them are not built.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0, in [0, 1).
        frozen_stages: -1 trains all; 0 freezes the patch embedding; n freezes the first n stages too. Output norms
            train in any case: a classifier's weights have none but the last.
        with_cp: recompute each block in backward to save memory (not re-entrant, so that it works under DDP).
        pad_input: pad right and bottom with zeros to a multiple of the last stride. False raises instead: padding
            belongs to `data_preprocessor=dict(pad_size_divisor=32)`, which tells the head about it.
        init_cfg: mmengine's; `dict(type="castling_det.Pretrained", checkpoint=FILE)` reads an MViTv2 file.

    Attributes:
        out_channels: channels of each returned map. out_strides: stride of each in pixels.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "tiny",
        *,
        attention: str = "castling",
        kv_pooling: bool = True,
        normalizer: str = "l2",
        center_keys: bool = False,
        local_conv: str | None = "image",
        local_conv_kernel_size: int = 3,
        threshold: float = 0.02,
        threshold_unit: str = "absolute",
        eval_aux: bool = False,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        pad_input: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTION_MODES))}")
        architecture = _architecture(arch)
        self.out_indices = _resolved_out_indices(out_indices, len(architecture.depths))
        self.depths = architecture.depths[: self.out_indices[-1] + 1]
        if not -1 <= frozen_stages <= len(self.depths):
            raise ValueError(f"frozen_stages={frozen_stages}: expected -1 (none) to {len(self.depths)} stages")
        self.attention = attention
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.pad_input = pad_input
        self.size_divisor = PATCH_STRIDE * 2 ** (len(self.depths) - 1)
        self.out_channels = [architecture.embed_dims * 2**stage for stage in self.out_indices]
        self.out_strides = [PATCH_STRIDE * 2**stage for stage in self.out_indices]

        image_hw = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if min(image_hw) < 1 or any(side % self.size_divisor for side in image_hw):
            raise ValueError(f"img_size={img_size}: expected multiples of {self.size_divisor}, such as 224")
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module(
            "proj", nn.Conv2d(in_channels, architecture.embed_dims, 7, stride=PATCH_STRIDE, padding=3)
        )
        options: dict[str, Any] = dict(
            qkv_bias=qkv_bias,
            mode=attention,
            normalizer=normalizer,
            center_keys=center_keys,
            local_conv=local_conv,
            local_conv_kernel_size=local_conv_kernel_size,
            threshold=threshold,
            threshold_unit=threshold_unit,
            eval_aux=eval_aux,
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(architecture.depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(self.depths):
            blocks = nn.ModuleList()
            for index in range(depth):
                halves = stage > 0 and index == 0
                stride_q = 2 if halves else 1
                dim = architecture.embed_dims * 2**stage
                grid_stride = PATCH_STRIDE * 2 ** (stage - halves)
                attn = PooledAttention(
                    dim // 2 if halves else dim,
                    architecture.num_heads * 2**stage,
                    dim_out=dim,
                    stride_q=stride_q,
                    stride_kv=max(architecture.stride_kv // 2**stage, 1) if kv_pooling else stride_q,
                    grid=(image_hw[0] // grid_stride, image_hw[1] // grid_stride),
                    **options,
                )
                blocks.append(PooledBlock(attn, mlp_ratio=mlp_ratio, drop_path=next(rates)))
            self.stages.append(nn.ModuleDict({"blocks": blocks}))
        for stage, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels, eps=1e-6))
        self._init_parameters()
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
                if self.with_cp and self.training and torch.is_grad_enabled():
                    tokens, hw = checkpoint(block, tokens, hw, use_reentrant=False)
                else:
                    tokens, hw = block(tokens, hw)
            if index in self.out_indices:
                normed: Tensor = getattr(self, f"norm{index}")(tokens)
                outputs.append(normed.transpose(1, 2).unflatten(2, hw))
        return tuple(outputs)

    def train(self, mode: bool = True) -> CastlingMViT:
        """As nn.Module's; frozen stages stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: full name, such as `backbone.stages.2.blocks.3.attn.qkv.weight`.
            prefix: what stands before this module's own names, such as `backbone.`.

        Returns:
            Layer id and number of layers: 0 for the patch embedding, 1 to depth for the blocks of all stages,
            depth + 1 for the output norms and what comes after them, of depth + 2 layers.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name = param_name[len(prefix) :]
        if name.startswith("patch_embed."):
            return 0, num_layers
        if name.startswith("stages."):
            _, stage, _, block, *_ = name.split(".")
            return sum(self.depths[: int(stage)]) + int(block) + 1, num_layers
        return num_layers - 1, num_layers

    def _checked_or_padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        stride = self.size_divisor
        pad_h, pad_w = -height % stride, -width % stride
        if pad_h == pad_w == 0:
            return x
        if not self.pad_input:
            raise ValueError(
                f"image of {height} x {width} pixels: expected multiples of {stride}; set "
                f"data_preprocessor.pad_size_divisor={stride} in the config, or pad_input=True in the backbone"
            )
        return F.pad(x, (0, pad_w, 0, pad_h))

    def _init_parameters(self) -> None:
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _frozen_modules(self) -> list[nn.Module]:
        return [] if self.frozen_stages < 0 else [self.patch_embed, *self.stages[: self.frozen_stages]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)


def _architecture(arch: str | dict[str, Any]) -> MViTArchitecture:
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            known = ", ".join(map(repr, ARCHITECTURES))
            raise ValueError(f"arch={arch!r}: expected one of {known}, or a dict with `depths`")
        return ARCHITECTURES[arch]
    unknown = set(arch) - set(MViTArchitecture._fields)
    if unknown or "depths" not in arch:
        raise ValueError(
            f"arch={dict(arch)}: expected `depths` and, where they differ from MViTv2-T's, "
            f"{', '.join(MViTArchitecture._fields[1:])}"
        )
    architecture = MViTArchitecture(**{**arch, "depths": tuple(arch["depths"])})
    if not architecture.depths or min(architecture.depths) < 1:
        raise ValueError(f"arch.depths={architecture.depths}: expected one block or more a stage")
    return architecture


def _resolved_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    resolved = tuple(index + num_stages if index < 0 else index for index in out_indices)
    if not resolved or list(resolved) != sorted(set(resolved)) or resolved[0] < 0 or resolved[-1] >= num_stages:
        raise ValueError(
            f"out_indices={tuple(out_indices)}: expected ascending, different stage indices in [0, {num_stages}), "
            "or negative ones counted from the last"
        )
    return resolved
