"""What the three backbones share: options of the attention, sizes of images, freezing, recomputation, layer depths."""

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
    """A backbone whose blocks attend by `attention`. The arguments here are those that every backbone takes.

    A subclass fills the attributes, builds its attention layers with `self.options`, and calls `_freeze` at its end.

    Args:
        attention: `"softmax"` (baseline), `"castling"` (hybrid while training) or `"linear"` (what is deployed).
        attn_cfg: further options by name, the fields of `castling_det.layers.AttentionOptions` except `mode`, such as
            `dict(threshold=1.0, threshold_unit="uniform")`. None: their defaults.
        frozen_stages: -1 trains all; 0 freezes the stem; n freezes the first n stages too. A stage of `CastlingViT` is
            one block.
        with_cp: recompute each block in backward to save memory (not re-entrant, so that it works under DDP).
        pad_input: pad right and bottom with zeros to multiples of `size_divisor`. Better do that by
            `data_preprocessor=dict(pad_size_divisor=...)`, which tells the head about the padding.
        init_cfg: mmengine's; `dict(type="castling_det.Pretrained", checkpoint=FILE)` reads a published ImageNet file.

    Attributes:
        out_channels: channels of each returned map. out_strides: stride of each in pixels.
        size_divisor: sides of images are padded to multiples of it.
        stem_names: modules and parameters before the first stage.
    """

    out_channels: list[int]
    out_strides: list[int]
    size_divisor: int
    stem_names: tuple[str, ...]

    def __init__(
        self,
        attention: str,
        attn_cfg: dict[str, Any] | None,
        *,
        frozen_stages: int,
        with_cp: bool,
        pad_input: bool,
        init_cfg: dict[str, Any] | None,
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
        """As in nn.Module; frozen stages stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer that a parameter belongs to, for layer-wise learning-rate decay.

        Args:
            param_name: full name, such as `backbone.blocks.3.attn.qkv.weight`.
            prefix: what stands before this module's own names, such as `backbone.`.

        Returns:
            Layer id and number of layers: 0 for the stem, then one for each block, then the last for all that follows.
        """
        blocks = [name for name, module in self.named_modules() if _has_attention(module)]
        last = len(blocks) + 1
        own = f"{param_name.removeprefix(prefix)}." if param_name.startswith(prefix) else ""
        if own.startswith(tuple(f"{name}." for name in self.stem_names)):
            return 0, last + 1
        found = (index for index, name in enumerate(blocks, start=1) if own.startswith(f"{name}."))
        return next(found, last), last + 1

    def _stages(self) -> Sequence[nn.Module]:
        return list(self.stages)

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        if self.frozen_stages < 0:
            return []
        return [*self._existing(*self.stem_names), *self._stages()[: self.frozen_stages]]

    def _existing(self, *names: str) -> list[Any]:
        return [getattr(self, name) for name in names if hasattr(self, name)]

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
        """Images whose sides are multiples of `size_divisor`."""
        height, width = x.shape[-2:]
        divisor = self.size_divisor
        pad_h, pad_w = -height % divisor, -width % divisor
        if pad_h == pad_w == 0:
            return x
        if not self.pad_input:
            raise ValueError(
                f"image of {height} x {width} pixels: expected multiples of {divisor}; set "
                f"data_preprocessor.pad_size_divisor={divisor} in the config, or pad_input=True in the backbone"
            )
        return F.pad(x, (0, pad_w, 0, pad_h))


def init_linear_layers(module: nn.Module) -> None:
    """Weights of all linear layers in `module` from a normal of 0.02, cut at two units; biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def resolved_indices(out_indices: Sequence[int], count: int, *, lowest_last: int = 0) -> tuple[int, ...]:
    """`out_indices` with negative ones counted from the last of `count` maps; the last must be >= `lowest_last`."""
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
    """The architecture that `known` has under a name, or the one that a dict of the fields of `kind` describes."""
    if isinstance(arch, str) and arch in known:
        return known[arch]
    fields = ", ".join(inspect.signature(kind).parameters)
    if isinstance(arch, str):
        raise ValueError(f"arch={arch!r}: expected one of {', '.join(map(repr, known))}, or a dict of {fields}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in arch.items()})
    except TypeError as error:
        raise ValueError(f"arch={dict(arch)}: expected a dict of {fields}") from error


def _has_attention(module: nn.Module) -> bool:
    return any(isinstance(child, MaskedAttention) for child in module.children())
