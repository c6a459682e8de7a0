"""LeViT for detection with castling attention in every block; parameter names are timm's Levit's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers import (
    ATTENTION_MODES,
    LevitAttention,
    LevitBlock,
    LevitDownsample,
    LevitStage,
    LevitStem,
    fuse_norms,
)
from castling_det.registry import MODELS

__all__ = ["ARCHITECTURES", "CastlingLeViT", "LeViTArchitecture"]


class LeViTArchitecture(NamedTuple):
    """The visible numbers of a LeViT, stage by stage."""

    embed_dims: tuple[int, ...]
    """Channels C."""
    num_heads: tuple[int, ...]
    """Heads of the blocks. Between stages there are C / key_dim of them, C of the stage before."""
    depths: tuple[int, ...]
    """Blocks after the subsampling."""
    key_dim: int
    """Channels of a head's queries and keys; its values have twice, between stages four times as many."""


ARCHITECTURES = {
    "128S": LeViTArchitecture((128, 256, 384), (4, 6, 8), (2, 3, 4), 16),
    "128": LeViTArchitecture((128, 256, 384), (4, 8, 12), (4, 4, 4), 16),
    "192": LeViTArchitecture((192, 288, 384), (3, 5, 6), (4, 4, 4), 32),
    "256": LeViTArchitecture((256, 384, 512), (4, 6, 8), (4, 4, 4), 32),
    "384": LeViTArchitecture((384, 512, 768), (6, 9, 12), (4, 4, 4), 32),
}

_STEM_STRIDE = 16
_SUBSAMPLING = 2
_BLOCK_VALUES, _SUBSAMPLING_VALUES = 2.0, 4.0
"""Channels of a head's values over those of its keys."""


@MODELS.register_module()
class CastlingLeViT(BaseModule):
    """LeViT (arXiv 2104.01136) as a detector's backbone: strides 8, 16, 32 and 64, attention over the whole map.

    Stride 8 is the third convolution of the stem, after its activation; strides 16, 32 and 64 are the outputs of the
    stages, residual sums without a norm. Images of any size are taken, and a map is ceil(size / stride).

    Weights of `attention="castling"` load strictly into `"linear"`; `"softmax"` (the baseline, equal to timm's Levit)
    has the tables of attention biases besides. What replaces them, and what v/2 and the local convolution are where
    queries are fewer than values, stands in `castling_det.layers.LevitAttention`.

    Args:
        arch: `"128S"`, `"128"`, `"192"`, `"256"`, `"384"`, or a dict with the fields of `LeViTArchitecture`.
        attention: `"softmax"` (baseline), `"castling"` (hybrid while training) or `"linear"` (what is deployed).
        normalizer: `"l2"` (published) or `"kernel"`, of the linear branch.
        center_keys: take the mean over the tokens from the keys of the linear branch; published False.
        local_conv: `"image"`, `"tokens"` (published) or None; the depthwise convolution on the values in every mode.
        local_conv_kernel_size: odd kernel size of `local_conv="image"`.
        threshold: start value of the mask, in `threshold_unit`; `MaskAnnealingHook` moves it.
        threshold_unit: `"absolute"` (published) or `"uniform"`, multiples of one over the number of keys.
        eval_aux: keep the softmax branch of `"castling"` in eval mode, to measure the gap.
        img_size: side in pixels of the square image that the biases of `"softmax"` are kept for; others interpolate
            them. LeViT is pre-trained at 224.
        in_channels: channels of the image.
        mlp_ratio: hidden width of the MLPs over the channels.
        out_indices: which of the strides 8, 16, 32 and 64 are returned, ascending; negative ones count from the last.
            Stages after the last of them are not built, so it must be one of the stages.
        drop_path_rate: stochastic depth of every residual branch, in [0, 1); LeViT-384 is pre-trained with 0.1.
        frozen_stages: -1 trains all; 0 freezes the stem; n freezes the first n stages too.
        with_cp: recompute each block in backward to save memory (not re-entrant, so that it works under DDP).
        pad_input: pad right and bottom with zeros to a multiple of the last stride, so that every map covers the same
            pixels. Better still `data_preprocessor=dict(pad_size_divisor=64)`, which tells the head about it.
        init_cfg: mmengine's; `dict(type="castling_det.Pretrained", checkpoint=FILE)` reads a LeViT file.

    Attributes:
        out_channels: channels of each returned map. out_strides: stride of each in pixels.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "128S",
        *,
        attention: str = "castling",
        normalizer: str = "l2",
        center_keys: bool = False,
        local_conv: str | None = "image",
        local_conv_kernel_size: int = 3,
        threshold: float = 0.02,
        threshold_unit: str = "absolute",
        eval_aux: bool = False,
        img_size: int = 224,
        in_channels: int = 3,
        mlp_ratio: float = 2.0,
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
        num_stages = self.out_indices[-1]
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f"frozen_stages={frozen_stages}: expected -1 (none) to {num_stages} stages")
        if img_size < _STEM_STRIDE:
            raise ValueError(f"img_size={img_size}: expected at least {_STEM_STRIDE} pixels, such as 224")
        self.attention = attention
        self.frozen_stages = frozen_stages
        self.pad_input = pad_input
        dims = architecture.embed_dims
        strides = [_STEM_STRIDE // 2, *(_STEM_STRIDE * _SUBSAMPLING**stage for stage in range(len(dims)))]
        self.out_channels = [[dims[0] // 2, *dims][index] for index in self.out_indices]
        self.out_strides = [strides[index] for index in self.out_indices]

        options: dict[str, Any] = dict(
            key_dim=architecture.key_dim,
            mode=attention,
            normalizer=normalizer,
            center_keys=center_keys,
            local_conv=local_conv,
            local_conv_kernel_size=local_conv_kernel_size,
            threshold=threshold,
            threshold_unit=threshold_unit,
            eval_aux=eval_aux,
        )
        branches: dict[str, Any] = dict(mlp_ratio=mlp_ratio, drop_path=drop_path_rate)
        self.stem = LevitStem(in_channels, dims[0])
        self.stages = nn.ModuleList()
        resolution = img_size // _STEM_STRIDE
        for stage in range(num_stages):
            downsample = None
            if stage:
                attn = LevitAttention(
                    dims[stage - 1],
                    dims[stage],
                    num_heads=dims[stage - 1] // architecture.key_dim,
                    attn_ratio=_SUBSAMPLING_VALUES,
                    query_stride=_SUBSAMPLING,
                    resolution=resolution,
                    **options,
                )
                downsample = LevitDownsample(attn, dims[stage], **branches)
                resolution = -(-resolution // _SUBSAMPLING)
            blocks = [
                LevitBlock(
                    LevitAttention(
                        dims[stage],
                        dims[stage],
                        num_heads=architecture.num_heads[stage],
                        attn_ratio=_BLOCK_VALUES,
                        resolution=resolution,
                        **options,
                    ),
                    **branches,
                )
                for _ in range(architecture.depths[stage])
            ]
            self.stages.append(LevitStage(downsample, blocks, with_cp=with_cp))
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, in_channels, H, W) to one map (B, C, ceil(H / stride), ceil(W / stride)) an out index."""
        if self.pad_input:
            divisor = self.out_strides[-1]
            x = F.pad(x, (0, -x.shape[-1] % divisor, 0, -x.shape[-2] % divisor))
        fine, x = self.stem(x)
        maps = [fine]
        hw = (x.shape[-2], x.shape[-1])
        tokens = x.flatten(2).transpose(1, 2)
        for stage in self.stages:
            tokens, hw = stage(tokens, hw)
            maps.append(tokens.transpose(1, 2).unflatten(2, hw))
        return tuple(maps[index] for index in self.out_indices)

    def fuse(self) -> CastlingLeViT:
        """Folds every BatchNorm into the layer before it, in place, for deployment; see `layers.fuse_norms`."""
        fuse_norms(self)
        return self

    def train(self, mode: bool = True) -> CastlingLeViT:
        """As nn.Module's; frozen stages stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: full name, such as `backbone.stages.1.blocks.0.attn.qkv.linear.weight`.
            prefix: what stands before this module's own names, such as `backbone.`.

        Returns:
            Layer id and number of layers: 0 for the stem, then one for each subsampling and block, and the last for
            what comes after them.
        """
        layers = ["stem."]
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, LevitStage)
            layers += [f"stages.{number}.downsample."] if stage.downsample is not None else []
            layers += [f"stages.{number}.blocks.{block}." for block in range(len(stage.blocks))]
        own = param_name[len(prefix) :] if param_name.startswith(prefix) else ""
        found = (index for index, start in enumerate(layers) if own.startswith(start))
        return next(found, len(layers)), len(layers) + 1

    def _frozen_modules(self) -> list[nn.Module]:
        return [] if self.frozen_stages < 0 else [self.stem, *self.stages[: self.frozen_stages]]


def _architecture(arch: str | dict[str, Any]) -> LeViTArchitecture:
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            known = ", ".join(map(repr, ARCHITECTURES))
            raise ValueError(f"arch={arch!r}: expected one of {known}, or a dict of {LeViTArchitecture._fields}")
        return ARCHITECTURES[arch]
    if set(arch) != set(LeViTArchitecture._fields):
        raise ValueError(f"arch={dict(arch)}: expected a dict of {', '.join(LeViTArchitecture._fields)}")
    per_stage = {name: tuple(arch[name]) for name in LeViTArchitecture._fields[:3]}
    architecture = LeViTArchitecture(**per_stage, key_dim=arch["key_dim"])
    if len({len(numbers) for numbers in per_stage.values()}) != 1 or not architecture.depths:
        raise ValueError(f"arch={dict(arch)}: expected one number a stage in each of {', '.join(per_stage)}")
    key_dim, (first, *_) = architecture.key_dim, architecture.embed_dims
    if first % 8 or any(dim < key_dim for dim in architecture.embed_dims[:-1]):
        raise ValueError(
            f"arch.embed_dims={architecture.embed_dims}: expected a first one that is a multiple of 8, for the stem, "
            f"and none below key_dim={key_dim}, for the heads between stages"
        )
    return architecture


def _resolved_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    count = num_stages + 1
    resolved = tuple(index + count if index < 0 else index for index in out_indices)
    if not resolved or list(resolved) != sorted(set(resolved)) or resolved[0] < 0 or not 0 < resolved[-1] < count:
        raise ValueError(
            f"out_indices={tuple(out_indices)}: expected ascending, different indices in [0, {count}), the last of "
            "them at least 1 (0 is the stem's map of stride 8, the others are stages), or negative ones counted from "
            "the last"
        )
    return resolved
