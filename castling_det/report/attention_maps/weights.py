"""The N x N weights that linear attention never forms, row by row and exact, beside those of softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from castling_det.layers import HeadInputs, MaskedAttention
from castling_det.ops.numerics import length_of, vector_norm

__all__ = ["BranchWeights", "branch_weights", "layer_weights"]

_COLUMNS = 512
"""Keys at once while v/2 is written as weights: of all queries, only these columns are alive."""


@dataclass(frozen=True)
class BranchWeights:
    """What both branches give to every key, for R queries; float64."""

    softmax: Tensor
    """(B, H, R, N), rows sum to 1. In softmax mode what the layer computes, position biases included; else the
    auxiliary branch before its mask, which has none."""
    linear: Tensor
    """(B, H, R, N), linear-angular weights before the normaliser. `"kernel"`: 1/2 + cos/pi, in
    [1/2 - 1/pi, 1/2 + 1/pi]. `"l2"`: cos/pi, in [-1/pi, 1/pi], and 1/2 more at the query's own place."""
    divisor: Tensor
    """(B, H, R), what the normaliser divides `linear` by: the row's sum, or the length of the row's sum of values."""
    threshold: float
    """Of the mask, a probability."""

    @property
    def kept(self) -> Tensor:
        """(B, H, R, N), the probabilities above the threshold, 0 elsewhere."""
        return self.softmax * (self.softmax > self.threshold)

    @property
    def kept_fraction(self) -> Tensor:
        """(B, H, R), share of the row's entries above the threshold, in [0, 1]."""
        return (self.softmax > self.threshold).double().mean(dim=-1)

    @property
    def kept_mass(self) -> Tensor:
        """(B, H, R), probability above the threshold, in [0, 1]."""
        return self.kept.sum(dim=-1)


def branch_weights(
    layer: MaskedAttention,
    inputs: HeadInputs,
    hw: tuple[int, int],
    *,
    queries: Sequence[int] | None = None,
    threshold: float | None = None,
) -> BranchWeights:
    """Evaluates both branches' rows, O(R N) in memory.

    Args:
        layer: the layer, whatever its mode.
        inputs: what `layer.head_inputs(x, hw)` gave.
        hw: height and width of the layer's map.
        queries: the R rows, indices of query tokens, prefix tokens first; None for all M of them.
        threshold: of the mask, in the layer's unit; None takes where the layer's mask stands.
    """
    rows = list(range(inputs.q.shape[2])) if queries is None else list(queries)
    q_BHRK, k_BHNK, v_BHNV = (x.detach().double() for x in (inputs.q[:, :, rows], inputs.k, inputs.v))
    num_keys = k_BHNK.shape[2]
    logits = q_BHRK @ k_BHNK.transpose(-2, -1) / math.sqrt(q_BHRK.shape[-1])
    if inputs.bias is not None:
        bias = inputs.bias.detach().double()
        logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, rows])
    unit_q, unit_k = (x / length_of(vector_norm(x)) for x in (q_BHRK, k_BHNK))
    linear = unit_q @ unit_k.transpose(-2, -1) / math.pi
    if layer.options.normalizer == "l2":
        linear = linear + 0.5 * _own_places(layer, num_keys, hw, rows)
        divisor = _lengths(linear, v_BHNV)
    else:
        linear = linear + 0.5
        divisor = linear.sum(dim=-1)
    mask = layer.mask_state if threshold is None else replace(layer.mask_state, threshold=threshold)
    return BranchWeights(logits.softmax(dim=-1), linear, divisor, mask.absolute(num_keys))


def layer_weights(layer: MaskedAttention, weights: BranchWeights, inputs: HeadInputs, *, aux: bool = False) -> Tensor:
    """The weights (B, H, R, N) whose product with the values is what the layer computes before its local convolution.

    Args:
        layer: says mode, normaliser and the factor of the softmax branch.
        weights: of that layer.
        inputs: of that layer.
        aux: with the masked softmax branch, as `"castling"` computes it while training. Not in softmax mode.
    """
    if layer.mode == "softmax":
        return weights.softmax
    if not aux:
        return weights.linear / weights.divisor.unsqueeze(-1)
    kept = weights.kept * layer.mask_state.aux_scale
    if layer.options.normalizer == "l2":
        total = weights.linear + kept
        return total / _lengths(total, inputs.v.detach().double()).unsqueeze(-1)
    average = weights.linear / weights.divisor.unsqueeze(-1)
    return (average + kept) / (1 + kept.sum(dim=-1, keepdim=True))


def _lengths(weights_BHRN: Tensor, v_BHNV: Tensor) -> Tensor:
    return length_of(vector_norm(weights_BHRN @ v_BHNV)).squeeze(-1)


def _own_places(layer: MaskedAttention, num_keys: int, hw: tuple[int, int], rows: Sequence[int]) -> Tensor:
    """(R, N): how the value at each query's own place is made of the values of the keys."""
    parts = []
    for first in range(0, num_keys, _COLUMNS):
        count = min(_COLUMNS, num_keys - first)
        columns = torch.zeros(1, num_keys, count)
        columns[0, first : first + count] = torch.eye(count)
        parts.append(layer.values_at_queries(columns, hw)[0, list(rows)])
    return torch.cat(parts, dim=-1).double()
