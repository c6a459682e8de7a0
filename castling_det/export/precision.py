"""What stays in float32 when a detector is exported in float16."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["hold_norms_in_float32"]


class _Float32Norm(nn.Module):
    """A norm whose statistics are taken in float32, between features of another type."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.float())
        return out.to(x.dtype)


def hold_norms_in_float32(module: nn.Module) -> None:
    """Wraps every LayerNorm and GroupNorm inside `module`, in place.

    Their mean and variance are sums over a whole token or a whole map, which float16 has no digits for. BatchNorm has
    none in eval mode: it is a scale and a shift. The attention itself accumulates in float32 in any precision.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
                setattr(parent, name, _Float32Norm(child))
