"""The auxiliary branch of training: softmax attention that keeps only the probabilities above a threshold.

Exact, computed in blocks of queries and again in backward: no N x N tensor is alive across the call or inside it. On a
GPU the blocks are the tiles of `triton_masked_softmax.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from castling_det.ops.numerics import (
    accumulation_dtype,
    empty_gradients,
    heads_of,
    kernels,
    uses_kernels,
    without_autocast,
)

__all__ = ["MaskedSoftmax", "masked_softmax", "masked_softmax_attention", "masked_softmax_packed"]

_BLOCK_ELEMENTS = 1 << 19
"""Probabilities that are alive at once: 2 MiB in float32, which fit in the caches."""


class MaskedSoftmax(NamedTuple):
    """The output of the branch and how much its mask kept."""

    out: Tensor
    """(B, H, M, V), `(p * [p > threshold]) @ v`."""
    kept_mass: Tensor
    """(B, H, M), the kept probability of each row, in [0, 1]; differentiable."""
    kept_fraction: Tensor
    """0-d float32, the kept share of all M x N entries, in [0, 1]; no gradient."""


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """Computes `p = softmax(scale * q k^T)`, keeps `p > threshold` (rows are not renormalised) and multiplies by v.

    Args:
        q: queries, (B, H, M, K), any float dtype.
        k: keys, (B, H, N, K).
        v: values, (B, H, N, V).
        threshold: probability in [0, inf]. From 1 on nothing is kept, and nothing is computed.
        scale: factor on the logits; None is K ** -0.5.

    Returns:
        Output in the dtype of `v`, kept mass in the accumulation dtype (float32 for half precisions).

    Raises:
        ValueError: negative or NaN threshold.
    """
    return _masked_softmax([q, k, v], threshold, scale, num_keys=k.shape[2])


def masked_softmax_packed(qkv: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """`masked_softmax` of a packed projection, (B, N, 3, H, K), whose gradient is written into one packed tensor."""
    return _masked_softmax([qkv], threshold, scale, num_keys=qkv.shape[1])


def _masked_softmax(inputs: list[Tensor], threshold: float, scale: float | None, *, num_keys: int) -> MaskedSoftmax:
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: expected a probability in [0, inf]; from 1 on the mask is empty")
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(inputs[0]):
        # A tensor, because the threshold changes every iteration and torch.compile makes a graph for every number.
        limit = torch.full((), threshold, dtype=torch.float64)
        out, kept_mass, count, _ = _forward(inputs, limit, scale)
    kept_fraction = (count.double() / max(kept_mass.numel() * num_keys, 1)).float()
    return MaskedSoftmax(out.to(inputs[-1].dtype), kept_mass, kept_fraction)


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`masked_softmax` without the kept mass: `(out, kept_fraction)`."""
    result = masked_softmax(q, k, v, threshold, scale=scale)
    return result.out, result.kept_fraction


# Registered operators, so that torch.compile and torch.export see each of them as one node. The inputs are q, k and v,
# or one packed projection, whose gradient then is one tensor too: autograd would stack three.
@torch.library.custom_op(
    "castling_det::masked_softmax",
    mutates_args=(),
    schema="(Tensor[] inputs, Tensor threshold, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(inputs: Sequence[Tensor], threshold: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, M, V), with heads side by side in memory; kept mass (B, H, M); kept entries, 0-d int64.

    Then the kernels' statistics of the rows, (2, B, H, M) float32, which plain operations leave empty.
    """
    q, k, v = heads_of(inputs)
    out, kept_mass, count, statistics = _empty_outputs(q, v)
    # No probability exceeds 1, though a computed one may by rounding: from a threshold of 1 on nothing is kept.
    limit = float(threshold)
    if uses_kernels(v) and limit < 1:
        kept = kernels("masked_softmax").forward(q, k, v, out, kept_mass, statistics, limit, scale)
        return out, kept_mass, kept.sum(dtype=torch.long), statistics
    for zeros in (out, kept_mass, count, statistics):
        zeros.zero_()
    for heads, rows in _blocks(q, k) if limit < 1 else ():
        sparse_GMN = F.threshold(_probabilities(q[rows] * scale, k[heads]), limit, 0.0, inplace=True)
        mass_GM = sparse_GMN.sum(dim=-1)
        # On an accelerator this test would make the host wait.
        if mass_GM.device.type == "cpu" and not mass_GM.any():
            continue
        kept_mass[rows] = mass_GM
        out[rows] = sparse_GMN @ v[heads]
        # Thirty times as fast as count_nonzero on a CPU. Float sums of ones are exact for any row that fits in memory.
        count += sparse_GMN.sign_().sum(dim=-1).sum(dtype=torch.long)
    return out, kept_mass, count, statistics


@torch.library.custom_op(
    "castling_det::masked_softmax_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_mass, Tensor[] inputs, Tensor out, Tensor kept_mass, Tensor statistics, "
    "Tensor threshold, float scale) -> Tensor[]",
)
def _backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    inputs: Sequence[Tensor],
    out: Tensor,
    kept_mass: Tensor,
    statistics: Tensor,
    threshold: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of the inputs; computes the probabilities again."""
    q, k, v = heads_of(inputs)
    limit = float(threshold)
    if uses_kernels(v) and limit < 1:
        gradients = empty_gradients(inputs)
        written = (out, kept_mass, statistics)
        kernels("masked_softmax").backward(heads_of(gradients), grad_out, grad_mass, q, k, v, written, limit, scale)
        return gradients
    gradients = [torch.zeros_like(x, dtype=out.dtype) for x in inputs]
    grad_q, grad_k, grad_v = heads_of(gradients)
    # The row sums sum_j p_ij dL/dp_ij of softmax's backward follow from the outputs, without N products a row.
    row_sums = (grad_out * out).sum(dim=-1) + grad_mass * kept_mass
    for heads, rows in _blocks(q, k) if limit < 1 else ():
        if kept_mass.device.type == "cpu" and not kept_mass[rows].any():
            continue
        scaled_q_GMK, grad_GMK = q[rows] * scale, grad_out[rows]
        p_GMN = _probabilities(scaled_q_GMK, k[heads])
        sparse_GMN = F.threshold(p_GMN, limit, 0.0)
        grad_v[heads] += sparse_GMN.transpose(-2, -1) @ grad_GMK
        grad_s_GMN = torch.baddbmm(grad_mass[rows].unsqueeze(-1), grad_GMK, v[heads].transpose(-2, -1))
        # Through the denominator every logit of a row, kept or not, receives a gradient.
        grad_s_GMN.mul_(sparse_GMN).addcmul_(p_GMN, row_sums[rows].unsqueeze(-1), value=-1)
        grad_q[rows] = grad_s_GMN @ k[heads] * scale
        grad_k[heads] += grad_s_GMN.transpose(-2, -1) @ scaled_q_GMK
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]


@_forward.register_fake
def _(inputs: Sequence[Tensor], threshold: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, _, v = heads_of(inputs)
    return _empty_outputs(q, v)


@_backward.register_fake
def _(grad_out: Tensor, grad_mass: Tensor, inputs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return empty_gradients(inputs)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tensors, threshold, ctx.scale = inputs
    out, kept_mass, count, statistics = output
    ctx.save_for_backward(*tensors, out, kept_mass, statistics, threshold)
    ctx.mark_non_differentiable(count, statistics)


def _gradients(ctx: Any, grad_out: Tensor, grad_mass: Tensor, *_: Tensor) -> tuple[list[Tensor], None, None]:
    *inputs, out, kept_mass, statistics, threshold = ctx.saved_tensors
    return _backward(grad_out, grad_mass, inputs, out, kept_mass, statistics, threshold, ctx.scale), None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, queries, _ = q.shape
    # Heads side by side in memory, as in a packed projection: merging them is a view, not a copy.
    out = v.new_empty((batch, queries, num_heads, v.shape[-1])).transpose(1, 2)
    kept_mass = v.new_empty((batch, num_heads, queries), dtype=accumulation_dtype(v.dtype))
    statistics = kept_mass.new_empty((2, *kept_mass.shape) if uses_kernels(v) else (0,))
    return out, kept_mass, kept_mass.new_empty((), dtype=torch.long), statistics


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, slice], tuple[int, slice, slice]]]:
    """Indices of heads, and of their queries, in blocks of at most `_BLOCK_ELEMENTS` probabilities (or one row)."""
    batch, num_heads, queries, _ = q.shape
    tokens = k.shape[2]
    rows = min(queries, max(1, _BLOCK_ELEMENTS // max(1, tokens)))
    heads = max(1, _BLOCK_ELEMENTS // max(1, rows * tokens))
    for image in range(batch):
        for head in range(0, num_heads, heads):
            for row in range(0, queries, rows):
                group = slice(head, min(head + heads, num_heads))
                yield (image, group), (image, group, slice(row, min(row + rows, queries)))


def _probabilities(scaled_q_GMK: Tensor, k_GNK: Tensor) -> Tensor:
    # Forward and backward make the same calls, so that an entry at the threshold falls on the same side in both.
    return torch.softmax(scaled_q_GMK @ k_GNK.transpose(-2, -1), dim=-1)
