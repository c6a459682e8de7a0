"""What the three backbones share: attention options, image sizes, freezing, recomputation, layer depths."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from castling_det.layers import ATTENTION_MODES, AttentionOptions, MaskedAttention

__all__ = ["CastlingBackbone", "resolved_architecture", "resolved_indices"]

ArchT = TypeVar("ArchT")

_ATTN_FIELDS = tuple(field.name for field in dataclasses.fields(AttentionOptions) if field.name != "mode")


class CastlingBackbone(BaseModule):
    """A backbone whose blocks attend by `attention`. Every backbone takes the arguments below.

    A subclass fills the attributes, builds its attention layers with `self.options`, and calls `_freeze` at its end.

    Args:
        attention: `mode` of `castling_det.layers.AttentionOptions`.
        attn_cfg: its other fields, such as `dict(threshold=1.0, threshold_unit="uniform")`.
        frozen_stages: -1 trains all; 0 freezes the stem; n freezes the first n stages (blocks of `CastlingViT`) too.
        with_cp: recompute each block in backward to save memory.
        pad_input: pad right and bottom with zeros to multiples of `size_divisor`. Better do that by
            `data_preprocessor=dict(pad_size_divisor=...)`, which tells the head about the padding.
        init_cfg: `dict(type="castling_det.Pretrained", checkpoint=FILE)` reads a published ImageNet file.

    Attributes:
        out_channels, out_strides: channels of each returned map, and its stride in pixels.
        size_divisor: image sides must be multiples of it.
        stem_names: modules and parameters before the first stage.
    """

    out_channels: list[int]
    out_strides: list[int]
    size_divisor: int
    stem_names: tuple[str, ...]

    def __init__(
        self,
        attention: str,
        *,
        attn_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        pad_input: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTION_MODES))}")
        unknown = sorted(set(attn_cfg or {}) - set(_ATTN_FIELDS))
        if unknown:
            raise ValueError(f"attn_cfg.{unknown[0]}: no such option; expected some of {', '.join(_ATTN_FIELDS)}")
        self.attention = attention
        self.options = AttentionOptions(mode=attention, **(attn_cfg or {}))
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.pad_input = pad_input

    def train(self, mode: bool = True) -> CastlingBackbone:
        """As in nn.Module, but frozen stages stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer id of a parameter, and the number of layers, for layer-wise learning-rate decay.

        The stem has the id 0, each block the next one, and everything after the blocks the last.

        Args:
            param_name: full name, such as `backbone.blocks.3.attn.qkv.weight`.
            prefix: the part of it before this module's own names, such as `backbone.`.
        """
        own = f"{param_name.removeprefix(prefix)}." if param_name.startswith(prefix) else ""
        blocks = [
            name
            for name, module in self.named_modules()
            if any(isinstance(child, MaskedAttention) for child in module.children())
        ]
        layers = [self.stem_names, *((name,) for name in blocks)]
        for depth, names in enumerate(layers):
            if own.startswith(tuple(f"{name}." for name in names)):
                return depth, len(layers) + 1
        return len(layers), len(layers) + 1

    def _stages(self) -> Sequence[nn.Module]:
        return list(self.stages)

    def _existing(self, *names: str) -> list[Any]:
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        if self.frozen_stages < 0:
            return []
        return [*self._existing(*self.stem_names), *self._stages()[: self.frozen_stages]]

    def _freeze(self) -> None:
        count = len(self._stages())
        if not -1 <= self.frozen_stages <= count:
            raise ValueError(f"frozen_stages={self.frozen_stages}: expected -1 (none) to {count} stages")
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _checked_or_padded(self, x: Tensor) -> Tensor:
        (height, width), divisor = x.shape[-2:], self.size_divisor
        padding = (0, -width % divisor, 0, -height % divisor)
        if padding == (0, 0, 0, 0):
            return x
        if not self.pad_input:
            raise ValueError(
                f"image of {height} x {width} pixels: expected multiples of {divisor}; set "
                f"data_preprocessor.pad_size_divisor={divisor} in the config, or pad_input=True in the backbone"
            )
        return F.pad(x, padding)


def init_linear_layers(module: nn.Module) -> None:
    """Truncated normal weights (standard deviation 0.02) and zero biases for all linear layers in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_odd(name: str, kernel_size: int) -> None:
    """Raises ValueError for an even or negative side of a kernel."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{name}={kernel_size}: expected an odd positive number, such as 5")


def resolved_indices(out_indices: Sequence[int], count: int, *, lowest_last: int = 0) -> tuple[int, ...]:
    """`out_indices` without negative ones, for `count` maps."""
    resolved = tuple(index + count if index < 0 else index for index in out_indices)
    ascending = bool(resolved) and list(resolved) == sorted(set(resolved))
    if not ascending or resolved[0] < 0 or not lowest_last <= resolved[-1] < count:
        raise ValueError(
            f"out_indices={tuple(out_indices)}: expected ascending, different indices in [0, {count}), the last of "
            f"them at least {lowest_last}, or negative ones counted from the last"
        )
    return resolved


def resolved_architecture(
    arch: str | Mapping[str, Any], known: Mapping[str, ArchT], kind: Callable[..., ArchT]
) -> ArchT:
    """An architecture by its name in `known`, or by a dict with the fields of `kind`."""
    if isinstance(arch, str) and arch in known:
        return known[arch]
    fields = ", ".join(inspect.signature(kind).parameters)
    if isinstance(arch, str):
        raise ValueError(f"arch={arch!r}: expected one of {', '.join(map(repr, known))}, or a dict of {fields}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in arch.items()})
    except TypeError as error:
        raise ValueError(f"arch={dict(arch)}: expected a dict of {fields}") from error
