"""Initialising a backbone from a local timm, DeiT, DINOv2, LeViT or MViTv2 checkpoint, with a report.

Total and loud: every entry of the file is loaded, or dropped with a reason, or refused; every parameter of
the model is filled or listed as new.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass

from mmengine.logging import print_log
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from castling_det.conversion import levit_keys, mvit_keys, vit_keys
from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.limits import not_finite, other_kinds
from castling_det.conversion.vit_keys import adopt_distillation_token, is_square, split_positions
from castling_det.conversion.weights import select_weights
from castling_det.registry import WEIGHT_INITIALIZERS

__all__ = ["LoadReport", "PretrainedViT", "load_pretrained"]

_NEVER_IN_A_VIT = re.compile(r"stem\.\d|.*\.attn(_downsample)?\.dconv\.|norm\d\.")


@dataclass(frozen=True)
class LoadReport:
    """What became of every entry of the file and every parameter of the model."""

    source: str
    loaded: tuple[str, ...]
    """Parameters of the model that were filled."""
    resized: dict[str, str]
    """Those of them that were resampled or combined: what was done."""
    new: tuple[str, ...]
    """Parameters that keep their initialisation."""
    dropped: dict[str, str]
    """Entries of the file that were not used: the reason."""
    loaded_elements: int
    """Elements of the model's parameters that were filled."""
    vit_elements: int
    """Elements of those that a ViT checkpoint can hold: all but the local convolutions and a conv stem."""
    total_elements: int
    """Elements of all parameters of the model."""

    @property
    def fraction(self) -> float:
        """Filled share of all parameters, by element, in [0, 1]."""
        return self.loaded_elements / self.total_elements

    @property
    def vit_fraction(self) -> float:
        """Filled share of the parameters that a ViT checkpoint can hold, by element, in [0, 1]."""
        return self.loaded_elements / self.vit_elements

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.fraction:.1%} of {self.total_elements:,} parameters loaded "
            f"({self.vit_fraction:.1%} of those that a ViT checkpoint can hold)"
        ]
        lines += [f"  resized  {name}: {what}" for name, what in self.resized.items()]
        lines += [f"  new      {name}" for name in _by_kind(self.new)]
        lines += [f"  dropped  {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)


def load_pretrained(
    backbone: nn.Module, path: str | os.PathLike[str], *, min_fraction: float = 0.95, weights: str = "auto"
) -> LoadReport:
    """Fills a `CastlingViT`, `CastlingLeViT` or `CastlingMViT` from a checkpoint file, in place.

    The position embedding is interpolated to the model's grid and the patch kernel resampled to its patch
    size. The class token takes up its own position, since the model keeps positions for patches only: the
    same function.

    Args:
        backbone: a `CastlingViT`, `CastlingLeViT` or `CastlingMViT`.
        path: `.pth`, `.pt` or `.safetensors` of timm, DeiT, DINOv2, LeViT, MViTv2, or of a detector with this backbone.
        min_fraction: smallest share to be loaded, in [0, 1], of the parameters that a ViT checkpoint can
            hold; the local convolutions and a convolutional stem are not counted.
        weights: `"auto"`, `"ema"` or `"online"`, as `castling_det.conversion.select_weights` takes it.

    Raises:
        ValueError: unreadable file, another width, block layout or kind of number, values that are not finite, or
            less than `min_fraction` loaded. The backbone is then as it was.
    """
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"min_fraction={min_fraction}: expected a share in [0, 1], such as 0.95")
    dropped: dict[str, str] = {}
    resized: dict[str, str] = {}
    target = backbone.state_dict()
    keys = next((table for table in (levit_keys, mvit_keys) if table.fits(target)), vit_keys)
    source = keys.renamed(select_weights(load_checkpoint(path), path, weights).tensors, dropped)
    adopt_distillation_token(source, target)
    split_positions(source, target, resized)
    filled = {name: value for name, value in source.items() if name in target}
    reasons = {name: keys.drop_reason(name, target) for name in source if name not in target}
    if unknown := [name for name, reason in reasons.items() if not reason]:
        raise ValueError(f"checkpoint {path}: {keys.unknown_message(unknown)}")
    _resample(filled, backbone, resized)
    for table in (levit_keys, mvit_keys):
        table.resize_tables(filled, target, resized)
    _check_shapes(path, filled, target)
    _check_numbers(path, filled, target)
    report = _report(path, backbone, filled, resized, {**dropped, **reasons})
    if report.vit_fraction < min_fraction:
        raise ValueError(
            f"checkpoint {path}: only {report.vit_fraction:.1%} of the backbone's ViT parameters are in it, "
            f"expected at least min_fraction={min_fraction:.0%}; is it the config's architecture?\n{report}"
        )
    backbone.load_state_dict({**target, **filled})
    return report


@WEIGHT_INITIALIZERS.register_module(name="Pretrained")
class PretrainedViT:
    """`init_cfg=dict(type="castling_det.Pretrained", checkpoint=FILE)`: `load_pretrained` before training.

    Args:
        checkpoint: local file.
        min_fraction: as in `load_pretrained`.
        weights: as in `load_pretrained`.
    """

    def __init__(self, checkpoint: str, *, min_fraction: float = 0.95, weights: str = "auto") -> None:
        self.checkpoint = checkpoint
        self.min_fraction = min_fraction
        self.weights = weights

    def __call__(self, module: nn.Module) -> None:
        """Fills `module` and logs the report."""
        report = load_pretrained(module, self.checkpoint, min_fraction=self.min_fraction, weights=self.weights)
        print_log(str(report), logger="current")


def _resample(filled: dict[str, Tensor], backbone: nn.Module, resized: dict[str, str]) -> None:
    if "pos_embed" in filled:
        # torch types every attribute of a module as Tensor | Module.
        grid: list[int] = list(backbone.pos_grid)  # type: ignore[arg-type]
        count = filled["pos_embed"].shape[1]
        old = [math.isqrt(count)] * 2 if is_square(count) else grid
        if old != grid:
            filled["pos_embed"] = resample_abs_pos_embed(filled["pos_embed"], grid, old, num_prefix_tokens=0)
            resized["pos_embed"] = f"{old[0]} x {old[1]} to {grid[0]} x {grid[1]} positions, bicubic"
    name = "patch_embed.proj.weight"
    if name in filled and filled[name].ndim == 4:
        old, new = list(filled[name].shape[-2:]), list(backbone.get_parameter(name).shape[-2:])
        if old != new:
            filled[name] = resample_patch_embed(filled[name], new)
            resized[name] = f"{old[0]} x {old[1]} to {new[0]} x {new[1]} pixels, inverse of the image's resize"


def _check_shapes(path: str | os.PathLike[str], filled: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    wrong = [
        f"{name} {tuple(value.shape)} for {tuple(target[name].shape)}"
        for name, value in filled.items()
        if value.shape != target[name].shape
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {path}: {len(wrong)} shapes differ from the backbone's, such as "
            f"{'; '.join(wrong[:3])}; give the backbone its arch or embed_dims, mlp_ratio and in_channels"
        )


def _check_numbers(path: str | os.PathLike[str], filled: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if kinds := other_kinds(filled, target):
        raise ValueError(
            f"checkpoint {path}: {len(kinds)} tensors hold another kind of number than the backbone's, such as "
            f"{'; '.join(kinds[:3])}; give floating-point weights"
        )
    if broken := not_finite(filled, target):
        raise ValueError(
            f"checkpoint {path}: values that are not finite in {len(broken)} tensors, such as {broken[0]}; "
            "take another file"
        )


def _report(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    filled: dict[str, Tensor],
    resized: dict[str, str],
    dropped: dict[str, str],
) -> LoadReport:
    elements = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    in_vits = [name for name in elements if name in filled or not _NEVER_IN_A_VIT.match(name)]
    return LoadReport(
        source=os.fspath(path),
        loaded=tuple(filled),
        resized=resized,
        new=tuple(name for name in backbone.state_dict() if name not in filled),
        dropped=dropped,
        loaded_elements=sum(count for name, count in elements.items() if name in filled),
        vit_elements=sum(elements[name] for name in in_vits),
        total_elements=sum(elements.values()),
    )


def _by_kind(names: tuple[str, ...]) -> list[str]:
    """One line for the same parameter of every block."""
    counts = Counter(re.sub(r"\b(stages|blocks)\.\d+\.", r"\1.*.", name) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
