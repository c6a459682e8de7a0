"""LeViT (arXiv 2104.01136) around its attention: stem, blocks, stages, and their fusion for deployment.

Norms, MLP and stem are timm's (Apache-2.0), parameter names too. Tokens are (B, N, C), the raster order of a map of
`hw` = (height, width).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.layers import DropPath
from timm.models.levit import ConvNorm, LevitMlp, LinearNorm, Stem16
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

from castling_det.layers.levit_attention import LevitAttention
from castling_det.layers.local_conv import strided_hw

__all__ = ["LevitBlock", "LevitDownsample", "LevitStage", "LevitStem", "fuse_norms"]


class LevitStem(Stem16):
    """Four 3x3 convolutions of stride 2 with BatchNorm, the width doubling up to C, Hardswish between them.

    Args:
        in_channels: channels of the image.
        embed_dims: channels C of the tokens, a multiple of 8.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__(in_channels, embed_dims, act_layer=nn.Hardswish)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps an image (B, in_channels, H, W) to two maps: (B, C / 2, ...) of stride 8, (B, C, ...) of stride 16.

        The first is taken after its activation. The second has none: the tokens start there.
        """
        for layer in list(self)[:-1]:
            x = layer(x)
        return x, self.conv4(x)


class LevitBlock(nn.Module):
    """`x + attn(x)`, then `x + mlp(x)`.

    Args:
        attn: the attention.
        mlp_ratio: hidden width of the MLP over the attention's channels.
        drop_path: stochastic depth rate of both branches, in [0, 1).
    """

    def __init__(self, attn: LevitAttention, *, mlp_ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn = attn
        self.drop_path1 = _drop_path(drop_path)
        self.mlp = _mlp(attn.in_dim, mlp_ratio)
        self.drop_path2 = _drop_path(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, N, C)."""
        x = x + self.drop_path1(self.attn(x, hw))
        return x + self.drop_path2(self.mlp(x))  # type: ignore[no-any-return]


class LevitDownsample(nn.Module):
    """`x = attn(x)` at a part of the places, then `x + mlp(x)`.

    Args:
        attn: the attention, with its `query_stride`.
        out_dim: channels C' of its output.
        mlp_ratio: hidden width of the MLP over `out_dim`.
        drop_path: stochastic depth rate of the MLP, in [0, 1).
    """

    def __init__(self, attn: LevitAttention, out_dim: int, *, mlp_ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn_downsample = attn
        self.mlp = _mlp(out_dim, mlp_ratio)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, M, C') of the subsampled one."""
        x = self.attn_downsample(x, hw)
        return x + self.drop_path(self.mlp(x))  # type: ignore[no-any-return]

    def out_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the subsampled map."""
        return strided_hw(hw, self.attn_downsample.query_stride)


class LevitStage(nn.Module):
    """A subsampling, except in the first stage, and blocks.

    Args:
        downsample: the subsampling, or None.
        blocks: the blocks after it.
        with_cp: recompute each of them in backward to save memory (not re-entrant, so that it works under DDP).
    """

    def __init__(self, downsample: LevitDownsample | None, blocks: Sequence[LevitBlock], *, with_cp: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Maps tokens (B, N, C) of a map of size `hw` to the tokens after the stage and the size of their map."""
        if self.downsample is not None:
            x, hw = self._run(self.downsample, x, hw), self.downsample.out_hw(hw)
        for block in self.blocks:
            x = self._run(block, x, hw)
        return x, hw

    def _run(self, block: nn.Module, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if not (self.with_cp and self.training and torch.is_grad_enabled()):
            return block(x, hw)  # type: ignore[no-any-return]

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _statistics_kept(block)

        return checkpoint(block, x, hw, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keeps BatchNorm's running statistics: the first forward has updated them, its repetition must not."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    state = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, state, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def fuse_norms(module: nn.Module) -> int:
    """Replaces every `LinearNorm` and `ConvNorm` inside `module` by one layer that computes the same in eval mode.

    Parameters change their names (`qkv.linear.weight` and `qkv.bn.*` become `qkv.weight` and `qkv.bias`). timm's own
    `fuse()` is not used because it makes float32 layers on the CPU, whatever the dtype and device of the module.

    Returns:
        How many were replaced.

    Raises:
        ValueError: a norm in training mode, which uses the statistics of its batch. Nothing is replaced then.
    """
    for name, part in module.named_modules():
        if isinstance(part, (LinearNorm, ConvNorm)) and (part.bn.training or part.linear.training):
            raise ValueError(f"{name}: is in training mode; call eval() on the model before its norms are fused")
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LinearNorm, ConvNorm)):
                fuse = fuse_linear_bn_eval if isinstance(child, LinearNorm) else fuse_conv_bn_eval
                setattr(parent, name, fuse(child.linear, child.bn))
                count += 1
    return count


def _mlp(dim: int, ratio: float) -> nn.Module:
    mlp: nn.Module = LevitMlp(dim, hidden_features=int(dim * ratio), act_layer=nn.Hardswish)
    return mlp


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()
