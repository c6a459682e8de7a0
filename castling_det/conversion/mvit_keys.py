"""The key table from MViTv2 checkpoints to `CastlingMViT`: names, relative positions, what may be left out and why.

Names of the model are timm's (Apache-2.0). Read besides: the authors' own (facebookresearch/mvit), whose blocks are
numbered through, and mmpretrain's, which are the authors' but for two.
"""

from __future__ import annotations

import re

from torch import Tensor

from castling_det.layers.mvit import resized_table

__all__ = ["drop_reason", "fits", "renamed", "resize_tables", "unknown_message"]

# What stands before the backbone's own names. Longest first.
_PREFIXES = ("module.backbone.", "backbone.", "module.", "_orig_mod.")

_DROPPED = (
    (r"head\.|fc\.|classifier\.", "classification head"),
    (r"norm\d\.", "the model does not return this stage"),
    (r"cls_token$", "the model has no class token"),
)

_BLOCK = re.compile(r"(stages\.\d+\.blocks\.\d+\.)(.*)")
_NUMBERED_THROUGH = re.compile(r"blocks\.(\d+)\.(.*)")


def fits(target: dict[str, Tensor]) -> bool:
    """Whether `target` is the state dict of a `CastlingMViT`."""
    return "stages.0.blocks.0.attn.pool_q.weight" in target


def renamed(tensors: dict[str, Tensor], dropped: dict[str, str]) -> dict[str, Tensor]:
    """The entries under the model's names, prefixes removed; those beside the prefix go to `dropped`."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(f"{p}patch_embed.") for name in tensors)), "")
    dropped |= {name: f"not under {prefix!r}" for name in tensors if not name.startswith(prefix)}
    source = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    # In a net whose blocks are numbered through, those that project their shortcut start a stage.
    starts = [0, *sorted(int(found[1]) for name in source if (found := re.match(r"blocks\.(\d+)\.proj\.weight", name)))]
    source = {_in_stages(name, starts): value for name, value in source.items()}
    last = max((int(found[1]) for name in source if (found := re.match(r"stages\.(\d+)\.", name))), default=0)
    names = {"patch_embed.projection.": "patch_embed.proj.", "norm.": f"norm{last}."}
    return {_with_start(name, names): value for name, value in source.items()}


def _in_stages(name: str, starts: list[int]) -> str:
    found = _NUMBERED_THROUGH.match(name)
    if found is None:
        return name
    number = int(found[1])
    stage = sum(start <= number for start in starts) - 1
    rest = _with_start(found[2], {"proj.": "shortcut_proj_attn."})
    return f"stages.{stage}.blocks.{number - starts[stage]}.{rest}"


def _with_start(name: str, starts: dict[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def resize_tables(filled: dict[str, Tensor], target: dict[str, Tensor], resized: dict[str, str]) -> None:
    """Interpolates relative positions that were kept for another image size, as the model's forward would."""
    for name, table in filled.items():
        if re.search(r"\.rel_pos_[hw]$", name) and table.ndim == 2 and len(table) != len(target[name]):
            filled[name] = resized_table(table, len(target[name]))
            resized[name] = f"{len(table)} to {len(target[name])} distances, linear"


def drop_reason(name: str, target: dict[str, Tensor]) -> str:
    """Why the model can do without an entry that it has no parameter for; empty when it cannot."""
    for pattern, reason in _DROPPED:
        if re.match(pattern, name):
            return reason
    block = _BLOCK.match(name)
    if block is None:
        return "" if name.startswith(("patch_embed.", "pos_embed")) else "no part of an MViTv2 backbone"
    if not any(other.startswith(block[1]) for other in target):
        return f"the model has no {block[1].removesuffix('.')}"
    if block[2] in ("attn.rel_pos_h", "attn.rel_pos_w"):
        return "relative positions are N x N logits, which only attention='softmax' has"
    return ""


def unknown_message(unknown: list[str]) -> str:
    """What to say of entries that must not be dropped."""
    return (
        f"{len(unknown)} entries change what the network computes and have no place in the backbone, such as "
        f"{', '.join(unknown[:3])}; take an MViTv2 without position embedding, and give the backbone the same arch, "
        "qkv_bias and local_conv"
    )
