"""LeViT (arXiv 2104.01136) but for its attention: stem, MLP, blocks, stages, and their fusion for deployment.

Names of parameters are those of facebookresearch/LeViT and timm (Apache-2.0). Tokens are (B, N, C), the raster order of
a map of `hw` = (height, width).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from castling_det.layers.levit_attention import LevitAttention, subsampled_hw
from castling_det.layers.linear_norm import ConvNorm, LinearNorm

__all__ = ["LevitBlock", "LevitDownsample", "LevitMlp", "LevitStage", "LevitStem", "fuse_norms"]


class LevitStem(nn.Module):
    """Four 3x3 convolutions of stride 2, the width doubling up to C, Hardswish between them.

    Args:
        in_channels: channels of the image.
        embed_dims: channels C of the tokens, a multiple of 8.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        widths = [in_channels, embed_dims // 8, embed_dims // 4, embed_dims // 2, embed_dims]
        self.conv1, self.conv2, self.conv3, self.conv4 = (ConvNorm(widths[i], widths[i + 1]) for i in range(4))
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps an image (B, in_channels, H, W) to its maps (B, C / 2, ...) of stride 8 and (B, C, ...) of stride 16.

        The first is taken after the activation, the second has none: it is where the tokens start.
        """
        x = self.act(self.conv2(self.act(self.conv1(x))))
        x = self.act(self.conv3(x))
        return x, self.conv4(x)


class LevitMlp(nn.Module):
    """Two linear layers with BatchNorm, Hardswish between them; the second norm's weight starts at 0.

    Args:
        dim: channels C. mlp_ratio: hidden width over `dim`.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.ln1 = LinearNorm(dim, int(dim * mlp_ratio))
        self.act = nn.Hardswish()
        self.ln2 = LinearNorm(int(dim * mlp_ratio), dim, bn_weight_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, C) to (B, N, C)."""
        out: Tensor = self.ln2(self.act(self.ln1(x)))
        return out


class LevitBlock(nn.Module):
    """`x + attn(x)`, then `x + mlp(x)`.

    Args:
        attn: the attention. mlp_ratio: hidden width of the MLP over its channels.
        drop_path: stochastic depth rate of both branches, in [0, 1).
    """

    def __init__(self, attn: LevitAttention, *, mlp_ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn = attn
        self.drop_path1 = _drop_path(drop_path)
        self.mlp = LevitMlp(attn.in_dim, mlp_ratio=mlp_ratio)
        self.drop_path2 = _drop_path(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, N, C)."""
        x = x + self.drop_path1(self.attn(x, hw))
        return x + self.drop_path2(self.mlp(x))  # type: ignore[no-any-return]


class LevitDownsample(nn.Module):
    """`x = attn(x)` at a part of the places, then `x + mlp(x)`.

    Args:
        attn: the attention, with its `query_stride`. out_dim: channels C' of its output.
        mlp_ratio, drop_path: of the MLP, as in `LevitBlock`.
    """

    def __init__(self, attn: LevitAttention, out_dim: int, *, mlp_ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn_downsample = attn
        self.mlp = LevitMlp(out_dim, mlp_ratio=mlp_ratio)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, M, C') of the subsampled one."""
        x = self.attn_downsample(x, hw)
        return x + self.drop_path(self.mlp(x))  # type: ignore[no-any-return]

    def out_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the subsampled map."""
        return subsampled_hw(hw, self.attn_downsample.query_stride)


class LevitStage(nn.Module):
    """Subsampling, but for the first stage, and blocks.

    Args:
        downsample: or None. blocks: the blocks after it.
        with_cp: recompute each of them in backward to save memory (not re-entrant, so that it works under DDP).
    """

    def __init__(self, downsample: LevitDownsample | None, blocks: Sequence[LevitBlock], *, with_cp: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Maps tokens (B, N, C) of a map of size `hw` to those of the stage and the size of its map."""
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
    """BatchNorm's running statistics stay: the forward has moved them, its repetition must not do so again."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    state = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, state, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def fuse_norms(module: nn.Module) -> None:
    """Puts one layer in the place of every `LinearNorm` and `ConvNorm` inside `module`, which computes the same.

    Parameters are renamed by it (`qkv.linear.weight`, `qkv.bn.*` become `qkv.weight`, `qkv.bias`) and the running
    statistics are gone. Softmax attention keeps its biases of the last map's size from here on, as LeViT does.

    Raises:
        ValueError: a norm in training mode, which goes by the statistics of its batch. Nothing is fused then.
    """
    for name, part in module.named_modules():
        if isinstance(part, (LinearNorm, ConvNorm)) and part.bn.training:
            raise ValueError(f"{name}: is in training mode; call eval() on the model before its norms are fused")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LinearNorm, ConvNorm)):
                setattr(parent, name, child.fused())
        if isinstance(parent, LevitAttention):
            parent.keep_biases = True


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()
