"""The key table from ViT checkpoints to `CastlingViT`: names, position layouts, what may be left out and why.

Names are timm's (Apache-2.0). The layouts of the position embedding follow timm's `VisionTransformer`, DeiT's
distilled models and DINOv2's hub models.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

__all__ = [
    "adopt_distillation_token",
    "drop_reason",
    "is_square",
    "renamed",
    "split_positions",
    "unknown_message",
]

# What stands before the ViT's own names: wrappers, a detector's backbone, DINO's teacher. Longest first.
_PREFIXES = ("module.backbone.", "backbone.", "module.", "_orig_mod.")

_RENAMED = {"register_tokens": "reg_token"}

_DROPPED = (
    (r"head(_dist|_drop)?\.|fc\.|fc_norm\.|pre_logits\.|classifier\.", "classification head"),
    (r"dist_token$", "distillation token"),
    (r"mask_token$", "only for masked-image training"),
    (r"decoder_|dino_head\.|ibot_head\.", "only for self-supervised training"),
    (r"patch_embed\.proj\.", "the model has a convolutional stem"),
    (r"(cls|reg)_token$", "the model declares no such token"),
    (r"norm\.", "the model has no final norm"),
)

# Entries that change what the blocks compute: a model that leaves them out is another network.
_ESSENTIAL = re.compile(r"blocks\.(\d+)\.|norm_pre\.|patch_embed\.|pos_embed")


def renamed(tensors: dict[str, Tensor], dropped: dict[str, str]) -> dict[str, Tensor]:
    """The entries under the model's names, prefixes removed; those beside the prefix go to `dropped`."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(f"{p}blocks.") for name in tensors)), "")
    source = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            own = name[len(prefix) :]
            source[_RENAMED.get(own, own)] = value
        else:
            dropped[name] = f"not under {prefix!r}"
    return source


def adopt_distillation_token(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """DeiT's second prefix token becomes the register of a model that declares one: the same function."""
    register = target.get("reg_token")
    if register is not None and "dist_token" in source and register.shape == source["dist_token"].shape:
        source.setdefault("reg_token", source.pop("dist_token"))


def split_positions(source: dict[str, Tensor], target: dict[str, Tensor], resized: dict[str, str]) -> None:
    """Leaves only patches in `source["pos_embed"]`; the positions of prefix tokens are added to the tokens.

    Raises:
        ValueError: the patches form no square grid.
    """
    if "pos_embed" not in source or "pos_embed" not in target:
        return
    tokens = [name for name in ("cls_token", "dist_token", "reg_token") if name in source]
    positions = source["pos_embed"]
    # All prefix tokens have a position, the class token alone (DINOv2), or none (timm's no_embed_class).
    layouts = {sum(source[name].shape[1] for name in owners): owners for owners in (tokens, tokens[:1], [])}
    patches = {positions.shape[1] - count: count for count in layouts}
    own = target["pos_embed"].shape[1]
    fitting = [number for number in patches if is_square(number)] or [n for n in patches if n == own]
    if not fitting:
        raise ValueError(
            f"pos_embed of {positions.shape[1]} positions: expected a square grid of patches, with or "
            f"without the tokens {tokens}; resample it to a square grid first"
        )
    count = patches[fitting[0]]
    source["pos_embed"] = positions[:, count:]
    start = 0
    for name in layouts[count]:
        stop = start + source[name].shape[1]
        source[name] = source[name] + positions[:, start:stop]
        start = stop
        if name in target:
            resized[name] = "its position added, since pos_embed is kept for patches only"


def is_square(count: int) -> bool:
    """Whether `count` patches can be a square grid."""
    return count > 0 and math.isqrt(count) ** 2 == count


def drop_reason(name: str, target: dict[str, Tensor]) -> str:
    """Why the model can do without an entry that it has no parameter for; empty when it cannot."""
    for pattern, reason in _DROPPED:
        if re.match(pattern, name):
            return reason
    essential = _ESSENTIAL.match(name)
    if essential is None:
        return "no part of a ViT backbone"
    block = essential[1]
    if block and not any(other.startswith(f"blocks.{block}.") for other in target):
        return f"the model has no block {block}"
    return ""


def unknown_message(unknown: list[str]) -> str:
    """What to say of entries that must not be dropped."""
    hint = (
        "set init_values (DINOv2: 1e-5) in the backbone for its layer scale"
        if any(re.search(r"\.ls[12]\.gamma$", name) for name in unknown)
        else "take a plain ViT, or give the backbone the same options"
    )
    return (
        f"{len(unknown)} entries change what the network computes and have no place in the backbone, such as "
        f"{', '.join(unknown[:3])}; {hint}"
    )
