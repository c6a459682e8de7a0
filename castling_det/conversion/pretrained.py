"""Fills a backbone from a local timm, DeiT, DINOv2, LeViT or MViTv2 checkpoint, with a report.

Every entry of the file is loaded, or dropped with a reason, or refused. Parameter names are timm's (Apache-2.0).
facebookresearch's LeViT and mvit, and mmpretrain's MViTv2, number their blocks through; their names are read too.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mmengine.logging import print_log
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from castling_det.conversion.checkpoints import load_checkpoint, select_weights
from castling_det.conversion.detectors import check_numbers, load_weights, other_shapes
from castling_det.layers.levit_attention import resized_biases
from castling_det.layers.mvit import resized_table
from castling_det.registry import WEIGHT_INITIALIZERS

__all__ = ["LoadReport", "PretrainedViT", "TrainedDetector", "load_pretrained"]

State = dict[str, Tensor]

_PREFIXES = ("module.backbone.", "backbone.", "module.", "_orig_mod.")
_NEVER_IN_A_VIT = re.compile(r"stem\.\d|.*\.attn(_downsample)?\.dconv\.|norm\d\.")
_NUMBERED_THROUGH = re.compile(r"blocks\.(\d+)\.(?:m\.)?(.*)")


@dataclass(frozen=True)
class LoadReport:
    """What became of every entry of the file and every parameter of the model."""

    source: str
    loaded: tuple[str, ...]
    """Parameters of the model that were filled."""
    resized: dict[str, str]
    """How some of them were resampled or combined."""
    new: tuple[str, ...]
    """Parameters that keep their initialisation."""
    dropped: dict[str, str]
    """Entries of the file that were not used: the reason."""
    fraction: float
    """Filled share of all parameters, by element, in [0, 1]."""
    vit_fraction: float
    """The same of the parameters that a ViT checkpoint can hold: all but local convolutions and a conv stem."""

    def __str__(self) -> str:
        # One line for the same parameter of every block.
        new = Counter(re.sub(r"\b(stages|blocks)\.\d+\.", r"\1.*.", name) for name in self.new)
        held = f"{self.vit_fraction:.1%} of those that a ViT checkpoint can hold"
        lines = [f"{self.source}: {self.fraction:.1%} of the parameters loaded ({held})"]
        lines += [f"  resized  {name}: {how}" for name, how in self.resized.items()]
        lines += [f"  new      {name}" + (f" ({count})" if count > 1 else "") for name, count in new.items()]
        lines += [f"  dropped  {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Family:
    """The checkpoints of one architecture; `block`, `essential`, `dropped` and `logits` hold patterns of names."""

    name: str
    starts: tuple[str, ...]
    """Names that follow the prefix in every file."""
    block: str
    essential: str
    """Entries outside of blocks that change what the network computes."""
    dropped: dict[str, str]
    """Entries that the model can do without: the reason."""
    logits: tuple[str, str]
    """Parameters that only softmax attention has, and what they are."""
    hint: str
    """What to change in the config where an entry has no place."""
    renamed: Callable[[State], State]

    def drop_reason(self, name: str, target: State) -> str:
        """Why the model can do without an entry that it has no parameter for; empty when it cannot."""
        for pattern, reason in self.dropped.items():
            if re.match(pattern, name):
                return reason
        block = re.match(self.block, name)
        if block is None:
            return "" if re.match(self.essential, name) else f"no part of the backbone of {self.name}"
        if not any(other.startswith(block[0]) for other in target):
            return f"the model has no {block[0].removesuffix('.')}"
        if re.search(self.logits[0], name):
            return f"{self.logits[1]} are N x N logits, which only attention='softmax' has"
        return ""


def _levit_names(source: State) -> State:
    """The authors number attention and MLP in turn; attention with `kv` starts a stage."""
    places: dict[int, str] = {}
    stage, block, owner = 0, 0, ""
    with_kv, with_qkv = (set(_numbers(rf"blocks\.(\d+)\.(?:m\.)?{part}\.", source)) for part in ("kv", "qkv"))
    for number in sorted(set(_numbers(_NUMBERED_THROUGH, source))):
        if number in with_kv:
            stage, block, owner = stage + 1, 0, f"stages.{stage + 1}.downsample."
            places[number] = f"{owner}attn_downsample."
        elif number in with_qkv:
            owner, block = f"stages.{stage}.blocks.{block}.", block + 1
            places[number] = f"{owner}attn."
        elif owner:
            places[number] = f"{owner}mlp."
    inner = {"proj.1.": "proj.ln.", "q.1.": "q.ln.", "0.": "ln1.", "2.": "ln2."}
    stem = {f"patch_embed.{2 * index}.": f"stem.conv{index + 1}." for index in range(4)}
    named = {}
    for name, value in source.items():
        found = _NUMBERED_THROUGH.match(name)
        if found and int(found[1]) in places:
            name = places[int(found[1])] + _with_start(found[2], inner)
        named[re.sub(r"\.c\.weight$", ".linear.weight", _with_start(name, stem))] = value
    return named


def _mvit_names(source: State) -> State:
    """In a net whose blocks are numbered through, the blocks that project their shortcut start a stage."""
    starts = sorted({0, *_numbers(r"blocks\.(\d+)\.proj\.weight", source)})
    named = {}
    for name, value in source.items():
        if found := _NUMBERED_THROUGH.match(name):
            number = int(found[1])
            stage = sum(start <= number for start in starts) - 1
            rest = _with_start(found[2], {"proj.": "shortcut_proj_attn."})
            name = f"stages.{stage}.blocks.{number - starts[stage]}.{rest}"
        named[name] = value
    last = max(_numbers(r"stages\.(\d+)\.", named), default=0)
    own = {"patch_embed.projection.": "patch_embed.proj.", "norm.": f"norm{last}."}
    return {_with_start(name, own): value for name, value in named.items()}


def _numbers(pattern: str | re.Pattern[str], names: Iterable[str]) -> list[int]:
    return [int(found[1]) for name in names if (found := re.match(pattern, name))]


def _with_start(name: str, starts: dict[str, str]) -> str:
    old = next((start for start in starts if name.startswith(start)), "")
    return starts[old] + name[len(old) :] if old else name


_HEAD = {r"head(_dist|_drop)?\.|fc\.|fc_norm\.|pre_logits\.|classifier\.": "classification head"}
_VIT = _Family(
    "ViT",
    ("blocks.",),
    r"blocks\.\d+\.",
    r"norm_pre\.|patch_embed\.|pos_embed",
    _HEAD
    | {
        r"dist_token$": "distillation token",
        r"mask_token$": "only for masked-image training",
        r"decoder_|dino_head\.|ibot_head\.": "only for self-supervised training",
        r"patch_embed\.proj\.": "the model has a convolutional stem",
        r"(cls|reg)_token$": "the model declares no such token",
        r"norm\.": "the model has no final norm",
    },
    (r"$^", ""),
    "take a plain ViT, or give the backbone the same options; layer scale (ls1, ls2) needs init_values (1e-5)",
    lambda source: {{"register_tokens": "reg_token"}.get(name, name): value for name, value in source.items()},
)
_LEVIT = _Family(
    "LeViT",
    ("stem.conv1.", "patch_embed.0."),
    r"stages\.\d+\.(blocks\.\d+|downsample)\.",
    r"stem\.",
    _HEAD | {r".*\.attention_bias_idxs$": "indices, made anew for every size of map"},
    (r"\.attention_biases$", "position biases"),
    "take a LeViT whose norms are not fused, and give the backbone the same arch and local_conv",
    _levit_names,
)
_MVIT = _Family(
    "MViTv2",
    ("patch_embed.",),
    r"stages\.\d+\.blocks\.\d+\.",
    r"patch_embed\.|pos_embed",
    _HEAD | {r"norm\d\.": "the model does not return this stage", r"cls_token$": "the model has no class token"},
    (r"\.rel_pos_[hw]$", "relative positions"),
    "take an MViTv2 without position embedding, and give the backbone the same arch, qkv_bias and local_conv",
    _mvit_names,
)


def load_pretrained(
    backbone: nn.Module, path: str | os.PathLike[str], *, min_fraction: float = 0.95, weights: str = "auto"
) -> LoadReport:
    """Fills a `CastlingViT`, `CastlingLeViT` or `CastlingMViT` from a checkpoint file, in place.

    Position embeddings, biases and the patch kernel are resampled to the model's grid and patch size. The model keeps
    positions for patches only, so the class token's position is added to the token.

    Args:
        backbone: the model.
        path: `.pth`, `.pt` or `.safetensors` of timm, DeiT, DINOv2, LeViT, MViTv2, or of a detector with this backbone.
        min_fraction: smallest share to be loaded, in [0, 1], of all parameters but local convolutions and a conv stem.
        weights: `"auto"`, `"ema"` or `"online"`, as `castling_det.conversion.select_weights` takes it.

    Raises:
        ValueError: unreadable file, another architecture, unusable numbers, or less than `min_fraction` loaded. The
            backbone is then as it was.
    """
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"min_fraction={min_fraction}: expected a share in [0, 1], such as 0.95")
    tensors = select_weights(load_checkpoint(path), path, weights).tensors
    target: State = backbone.state_dict()
    levit, mvit = "stem.conv1.linear.weight" in target, "stages.0.blocks.0.attn.pool_q.weight" in target
    family = _LEVIT if levit else _MVIT if mvit else _VIT
    own = [name for name in tensors if any(start in name for start in family.starts)]
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in own)), "")
    dropped = {name: f"not under {prefix!r}" for name in tensors if not name.startswith(prefix)}
    own_state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    source, resized = family.renamed(own_state), dict[str, str]()
    if family is _VIT:
        _split_positions(source, target, resized)
    dropped |= {name: family.drop_reason(name, target) for name in source if name not in target}
    if unknown := [name for name, reason in dropped.items() if not reason]:
        raise ValueError(
            f"checkpoint {path}: {len(unknown)} entries change what the network computes and have no place in the "
            f"backbone, such as {', '.join(unknown[:3])}; {family.hint}"
        )
    filled = {name: value for name, value in source.items() if name in target}
    for name, value in filled.items():
        filled[name], how = _fitted(name, value, target[name], getattr(backbone, "pos_grid", None))
        resized |= {name: how} if how else {}
    if wrong := other_shapes(filled, target):
        raise ValueError(
            f"checkpoint {path}: {len(wrong)} shapes differ from the backbone's, such as "
            f"{'; '.join(wrong[:3])}; give the backbone its arch or embed_dims, mlp_ratio and in_channels"
        )
    check_numbers(filled, target, path)
    new = tuple(name for name in target if name not in filled)
    elements = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    count = sum(number for name, number in elements.items() if name in filled)
    in_vits = sum(n for name, n in elements.items() if name in filled or not _NEVER_IN_A_VIT.match(name))
    shares = (count / sum(elements.values()), count / in_vits)
    report = LoadReport(os.fspath(path), tuple(filled), resized, new, dropped, *shares)
    if report.vit_fraction < min_fraction:
        raise ValueError(
            f"checkpoint {path}: only {report.vit_fraction:.1%} of the backbone's ViT parameters are in it, "
            f"expected at least min_fraction={min_fraction:.0%}; is it the config's architecture?\n{report}"
        )
    backbone.load_state_dict({**target, **filled})
    return report


def _split_positions(source: State, target: State, resized: dict[str, str]) -> None:
    """Leaves only patches in `source["pos_embed"]`; the positions of prefix tokens are added to the tokens."""
    register = target.get("reg_token")
    if register is not None and "dist_token" in source and register.shape == source["dist_token"].shape:
        # DeiT's second prefix token is the register of a model that declares one: the same function.
        source.setdefault("reg_token", source.pop("dist_token"))
    if "pos_embed" not in source or "pos_embed" not in target:
        return
    tokens = [name for name in ("cls_token", "dist_token", "reg_token") if name in source]
    positions, own = source["pos_embed"], target["pos_embed"].shape[1]
    # All prefix tokens have a position, the class token alone (DINOv2), or none (timm's no_embed_class).
    layouts = {sum(source[name].shape[1] for name in owners): owners for owners in (tokens, tokens[:1], [])}
    patches = {positions.shape[1] - count: count for count in layouts}
    fitting = [number for number in patches if _is_square(number)] or [number for number in patches if number == own]
    if not fitting:
        raise ValueError(
            f"pos_embed of {positions.shape[1]} positions: expected a square grid of patches, with or "
            f"without the tokens {tokens}; resample it to a square grid first"
        )
    start = count = patches[fitting[0]]
    source["pos_embed"] = positions[:, count:]
    for name in reversed(layouts[count]):
        stop, start = start, start - source[name].shape[1]
        source[name] = source[name] + positions[:, start:stop]
        if name in target:
            resized[name] = "its position added, since pos_embed is kept for patches only"


def _fitted(name: str, value: Tensor, own: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, str]:
    """`value` resampled to the shape of the model's parameter, and how; as it is where nothing is known to do."""
    if name == "pos_embed" and grid is not None:
        side = math.isqrt(value.shape[1])
        old = (side, side) if _is_square(value.shape[1]) else grid
        if old != grid:
            resampled = resample_abs_pos_embed(value, list(grid), list(old), num_prefix_tokens=0)
            return resampled, f"{side} x {side} to {grid[0]} x {grid[1]} positions, bicubic"
    elif name == "patch_embed.proj.weight" and value.ndim == own.ndim == 4 and value.shape[2:] != own.shape[2:]:
        (old_h, old_w), new = value.shape[2:], own.shape[2:]
        how = f"{old_h} x {old_w} to {new[0]} x {new[1]} pixels, inverse of the image's resize"
        return resample_patch_embed(value, list(new)), how
    elif re.search(r"\.rel_pos_[hw]$", name) and value.ndim == 2 and len(value) != len(own):
        return resized_table(value, len(own)), f"{len(value)} to {len(own)} distances, linear"
    elif name.endswith(".attention_biases") and value.ndim == 2 and value.shape[1] != own.shape[1]:
        old_side, new_side = math.isqrt(value.shape[1]), math.isqrt(own.shape[1])
        if old_side**2 == value.shape[1]:
            how = f"{old_side} x {old_side} to {new_side} x {new_side} distances, bilinear"
            return resized_biases(value, (new_side, new_side)), how
    elif value.shape[2:] == (1, 1) and own.ndim == 2:
        return value.flatten(1), "a 1x1 convolution, as a linear layer"
    return value, ""


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


@WEIGHT_INITIALIZERS.register_module(name="Pretrained")
class PretrainedViT:
    """`init_cfg=dict(type="castling_det.Pretrained", checkpoint=FILE)`: `load_pretrained` before training.

    Args:
        checkpoint: local file.
        min_fraction, weights: as in `load_pretrained`.
    """

    def __init__(self, checkpoint: str, *, min_fraction: float = 0.95, weights: str = "auto") -> None:
        self.checkpoint = checkpoint
        self.options = {"min_fraction": min_fraction, "weights": weights}

    def __call__(self, module: nn.Module) -> None:
        """Fills `module` and logs the report."""
        print_log(str(load_pretrained(module, self.checkpoint, **self.options)), logger="current")  # type: ignore[arg-type]


@WEIGHT_INITIALIZERS.register_module()
class TrainedDetector:
    """Fills a detector with the weights of `checkpoint`, averaged ones if there are any; every name must fit.

    Args:
        checkpoint: file of a training of the same detector; it is read without running code in it.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Raises ValueError where the file or its weights do not fit `module`."""
        load_weights(module, load_checkpoint(self.checkpoint), self.checkpoint)
