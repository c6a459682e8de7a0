"""The key table from LeViT checkpoints to `CastlingLeViT`: names, layouts, biases, what may be left out and why.

Names of the model are timm's (Apache-2.0). Read besides: the authors' own (facebookresearch/LeViT), whose blocks are
numbered through, attention and MLP in turn, and timm's with 1x1 convolutions in the place of linear layers.
"""

from __future__ import annotations

import re

from torch import Tensor

from castling_det.layers.levit_attention import resized_biases

__all__ = ["drop_reason", "fits", "renamed", "resize_tables", "unknown_message"]

# What stands before the backbone's own names. Longest first.
_PREFIXES = ("module.backbone.", "backbone.", "module.", "_orig_mod.")
_OWN_STARTS = ("stem.conv1.", "patch_embed.0.")

_DROPPED = (
    (r"head(_dist)?\.", "classification head"),
    (r".*\.attention_bias_idxs$", "indices, made anew for every size of map"),
)

_NUMBERED_THROUGH = re.compile(r"blocks\.(\d+)\.(?:m\.)?(.*)")

# The authors' names inside a block and of the stem, longest first where one starts the other.
_AUTHORS_PARTS = {"proj.1.": "proj.ln.", "q.1.": "q.ln.", "0.": "ln1.", "2.": "ln2."}
_AUTHORS_STEM = {f"patch_embed.{2 * index}.": f"stem.conv{index + 1}." for index in range(4)}

_LAYER = re.compile(r"stages\.\d+\.(blocks\.\d+|downsample)\.")


def fits(target: dict[str, Tensor]) -> bool:
    """Whether `target` is the state dict of a `CastlingLeViT`."""
    return any(name.startswith("stem.conv1.") for name in target)


def renamed(tensors: dict[str, Tensor], dropped: dict[str, str]) -> dict[str, Tensor]:
    """The entries under the model's names, prefixes removed; those beside the prefix go to `dropped`."""
    own = [name for name in tensors if any(start in name for start in _OWN_STARTS)]
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in own)), "")
    dropped |= {name: f"not under {prefix!r}" for name in tensors if not name.startswith(prefix)}
    source = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    places = _places(source)
    return {_own_name(name, places): value for name, value in source.items()}


def _places(source: dict[str, Tensor]) -> dict[int, str]:
    """Where each of the authors' numbered blocks stands in the model; empty for other names."""
    parts: dict[int, set[str]] = {}
    for name in source:
        if found := _NUMBERED_THROUGH.match(name):
            parts.setdefault(int(found[1]), set()).add(found[2].split(".")[0])
    places = {}
    stage, block, owner = 0, 0, ""
    for number in sorted(parts):
        if "kv" in parts[number]:
            stage, block, owner = stage + 1, 0, f"stages.{stage + 1}.downsample."
            places[number] = f"{owner}attn_downsample."
        elif "qkv" in parts[number]:
            owner = f"stages.{stage}.blocks.{block}."
            block += 1
            places[number] = f"{owner}attn."
        elif owner:
            places[number] = f"{owner}mlp."
    return places


def _own_name(name: str, places: dict[int, str]) -> str:
    found = _NUMBERED_THROUGH.match(name)
    if found is not None and int(found[1]) in places:
        name = places[int(found[1])] + _with_start(found[2], _AUTHORS_PARTS)
    return re.sub(r"\.c\.weight$", ".linear.weight", _with_start(name, _AUTHORS_STEM))


def _with_start(name: str, starts: dict[str, str]) -> str:
    old = next((start for start in starts if name.startswith(start)), "")
    return starts[old] + name[len(old) :] if old else name


def resize_tables(filled: dict[str, Tensor], target: dict[str, Tensor], resized: dict[str, str]) -> None:
    """Biases of another image size, as the model's forward would interpolate them; 1x1 kernels as matrices."""
    for name, value in filled.items():
        if name.endswith(".attention_biases") and value.ndim == 2 and value.shape[1] != target[name].shape[1]:
            old, new = (round(table.shape[1] ** 0.5) for table in (value, target[name]))
            if old * old == value.shape[1]:
                filled[name] = resized_biases(value, (new, new))
                resized[name] = f"{old} x {old} to {new} x {new} distances, bilinear"
        elif value.shape[2:] == (1, 1) and target[name].ndim == 2:
            filled[name] = value.flatten(1)
            resized[name] = "a 1x1 convolution, as a linear layer"


def drop_reason(name: str, target: dict[str, Tensor]) -> str:
    """Why the model can do without an entry that it has no parameter for; empty when it cannot."""
    for pattern, reason in _DROPPED:
        if re.match(pattern, name):
            return reason
    layer = _LAYER.match(name)
    if layer is None:
        return "" if name.startswith("stem.") else "no part of a LeViT backbone"
    if not any(other.startswith(layer[0]) for other in target):
        return f"the model has no {layer[0].removesuffix('.')}"
    if name.endswith(".attention_biases"):
        return "position biases are N x N logits, which only attention='softmax' has"
    return ""


def unknown_message(unknown: list[str]) -> str:
    """What to say of entries that must not be dropped."""
    return (
        f"{len(unknown)} entries change what the network computes and have no place in the backbone, such as "
        f"{', '.join(unknown[:3])}; take a LeViT whose norms are not fused, and give the backbone the same arch and "
        "local_conv"
    )
