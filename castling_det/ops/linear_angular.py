"""Linear-angular attention (Castling-ViT, arXiv 2211.10526): the angular kernel without its residual, O(N K^2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castling_det.ops.masked_softmax import MaskedSoftmax
from castling_det.ops.numerics import (
    EPS,
    accumulation_dtype,
    kernels,
    length_of,
    uses_kernels,
    vector_norm,
    without_autocast,
)

__all__ = ["NORMALIZERS", "linear_angular_attention", "linear_angular_packed"]

NORMALIZERS = ("l2", "kernel")


def linear_angular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "l2",
    aux: MaskedSoftmax | None = None,
    v_at_q: Tensor | None = None,
) -> Tensor:
    """Attends with sim(q, k) = 1/2 + cos(q, k)/pi, evaluated as q^ (k^T v), hats L2-normalised over the last axis.

    `normalizer="l2"` is the published block: `l2(aux + v/2 + (1/pi) q^ (k^T v))`, v/2 taken per token.
    `normalizer="kernel"` is the row-stochastic form: `sum_j w_ij v_j` with `w_ij = sim_ij / sum_j sim_ij`. There
    sim >= 1/2 - 1/pi > 0, so that each output is a convex average of the values.

    Args:
        q: queries, (B, H, M, K), any float dtype, not normalised.
        k: keys, (B, H, N, K).
        v: values, (B, H, N, V).
        normalizer: `"l2"` or `"kernel"`.
        aux: the masked softmax branch of the same q, k, v in training, or None. `"l2"` adds its output to the sum
            (published). `"kernel"` takes the average of both branches' weights,
            `(linear + aux.out) / (1 + aux.kept_mass)`: convex at every threshold, and equal to `linear` once the mask
            is empty.
        v_at_q: values at the query positions, (B, H, M, V), for the v/2 term of `"l2"`. None takes `v`, with M = N.
            `"kernel"` does not use it: its constant term is the same for every query.

    Returns:
        (B, H, M, V), dtype of `v`. Half precisions are accumulated in float32, also under autocast.

    Raises:
        ValueError: unknown `normalizer`, or shapes that do not fit.
    """
    _check_normalizer(normalizer)
    v_at_q = v if v_at_q is None else v_at_q
    _check_shapes(q, k, v, v_at_q if normalizer == "l2" else None)
    if _uses_kernels(normalizer, q, v):
        inputs = (q, k, v) if v_at_q is v else (q, k, v, v_at_q)
        out: Tensor = kernels("linear_angular").LinearAngular.apply(None if aux is None else aux.out, *inputs)[0]
        return out
    accumulation = accumulation_dtype(v.dtype)
    with without_autocast(v):
        q_BMHK, k_BNHK, v_BNHV, own_BMHV = (x.to(accumulation).transpose(1, 2) for x in (q, k, v, v_at_q))
        norms = vector_norm(q_BMHK), vector_norm(k_BNHK)
        result = _weighted_sum(q_BMHK, k_BNHK, v_BNHV, norms, normalizer, aux, own_BMHV)
        return result.out().to(v.dtype).transpose(1, 2)


def linear_angular_packed(
    qkv: Tensor,
    *,
    normalizer: str = "l2",
    aux: MaskedSoftmax | None = None,
    local: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`linear_angular_attention` on a packed projection, without copies that permute or merge heads.

    The gradient of `normalizer="l2"` is written by hand and can be taken only once.

    Args:
        qkv: queries, keys and values, (B, N, 3, H, K), any float dtype.
        normalizer: `"l2"` or `"kernel"`.
        aux: the masked softmax branch, its tensors (B, H, N, K) and (B, H, N), or None.
        local: a function of the values, (B, N, H, K) contiguous, whose result, a new tensor of that shape, is added;
            the local convolution. It shares the copy of the values and their gradient.

    Returns:
        (B, N, H, K), in the dtype of `local`'s result if given, else in that of `qkv`.

    Raises:
        ValueError: unknown `normalizer`.
    """
    _check_normalizer(normalizer)
    if _uses_kernels(normalizer, qkv):
        out_BHNK, v_BNHK = kernels("linear_angular").LinearAngular.apply(None if aux is None else aux.out, qkv)
        out_BNHK = out_BHNK.transpose(1, 2)
        return out_BNHK if local is None else local(v_BNHK).add_(out_BNHK)
    if normalizer == "l2" and torch.is_grad_enabled() and not _is_traced():
        out_BNHK, v_BNHK = _PackedUnitSum.apply(qkv, None if aux is None else aux.out)  # type: ignore[no-untyped-call]
        return out_BNHK.to(qkv.dtype) if local is None else local(v_BNHK).add_(out_BNHK)
    v_BNHK = qkv[:, :, 2].contiguous()
    # First, so that the operations below reuse the memory of its temporaries while that is in the caches.
    local_BNHK = None if local is None else local(v_BNHK)
    with without_autocast(qkv):
        x_BN3HK = qkv.to(accumulation_dtype(qkv.dtype))
        q_BNHK, k_BNHK, _ = x_BN3HK.unbind(2)
        values_BNHK = v_BNHK.to(x_BN3HK.dtype)
        result = _weighted_sum(q_BNHK, k_BNHK, values_BNHK, _packed_norms(x_BN3HK), normalizer, aux, values_BNHK)
        if local_BNHK is None:
            return result.out().to(qkv.dtype)
        return local_BNHK.addcmul_(result.total_BMHV, result.factor_BMH1)


def _is_traced() -> bool:
    # A compiler fuses the derivative of the formula on its own; a tracer needs the formula.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _uses_kernels(normalizer: str, *tensors: Tensor) -> bool:
    if normalizer != "l2" or _is_traced() or not uses_kernels(tensors[-1]):
        return False
    return bool(kernels("linear_angular").fits(*tensors))


class _WeightedSum(NamedTuple):
    """The branch before its normaliser, and intermediate results that the gradient needs."""

    total_BMHV: Tensor
    factor_BMH1: Tensor
    kv_BHKV: Tensor
    q_length_BMH1: Tensor
    k_length_BNH1: Tensor

    def out(self) -> Tensor:
        # Autograd saves the total for the backward of its norm. Only without autograd may it be overwritten.
        in_place = not self.total_BMHV.requires_grad
        return self.total_BMHV.mul_(self.factor_BMH1) if in_place else self.total_BMHV * self.factor_BMH1


def _weighted_sum(
    q_BMHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    norms: tuple[Tensor, Tensor],
    normalizer: str,
    aux: MaskedSoftmax | None,
    own_BMHV: Tensor,
) -> _WeightedSum:
    dtype = v_BNHV.dtype
    q_length_BMH1, k_length_BNH1 = (length_of(norm) for norm in norms)
    # Scaling all terms by 1/N cancels in either normaliser, and keeps the squared norm of the sum in range.
    per_token = 1.0 / v_BNHV.shape[1]
    k_scale_BNH1 = per_token / math.pi / k_length_BNH1
    # The scaled keys are not stored in a variable, so that the total reuses their memory while it is in the caches.
    kv_BHKV = _matmul((k_BNHK * k_scale_BNH1).permute(0, 2, 3, 1), v_BNHV.transpose(1, 2))
    # Scaling all terms by |q| cancels as well, so that q is never normalised.
    total_BMHV = _matmul(q_BMHK.transpose(1, 2), kv_BHKV).transpose(1, 2)
    if normalizer == "l2":
        total_BMHV.addcmul_(own_BMHV, q_length_BMH1 * (0.5 * per_token))
        if aux is not None:
            total_BMHV.addcmul_(aux.out.to(dtype).transpose(1, 2), q_length_BMH1 * per_token)
        divisor_BMH1 = length_of(vector_norm(total_BMHV), q_length_BMH1 * (EPS * per_token))
    else:
        total_BMHV.addcmul_(v_BNHV.mean(dim=1, keepdim=True), q_length_BMH1, value=0.5)
        ksum_BHK1 = k_BNHK.permute(0, 2, 3, 1) @ k_scale_BNH1.transpose(1, 2)
        divisor_BMH1 = (q_BMHK.transpose(1, 2) @ ksum_BHK1).transpose(1, 2) + 0.5 * q_length_BMH1
        if aux is not None:
            total_BMHV = total_BMHV + aux.out.to(dtype).transpose(1, 2) * divisor_BMH1
            divisor_BMH1 = divisor_BMH1 * (1.0 + aux.kept_mass.to(dtype).transpose(1, 2).unsqueeze(-1))
    return _WeightedSum(total_BMHV, divisor_BMH1.reciprocal(), kv_BHKV, q_length_BMH1, k_length_BNH1)


class _PackedUnitSum(torch.autograd.Function):
    """`normalizer="l2"` with the gradient of q, k and v written into one packed tensor.

    Autograd would take 1.7 times as long for forward and backward: it differentiates the norms over all of `qkv`, and
    scatters, stacks and adds the parts.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, aux: Tensor | None) -> tuple[Tensor, Tensor]:
        """The branch, (B, N, H, K) in the accumulation dtype, and a contiguous copy of the values in their dtype."""
        v_BNHK = qkv[:, :, 2].contiguous()
        with without_autocast(qkv):
            x_BN3HK = qkv.to(accumulation_dtype(qkv.dtype))
            q_BNHK, k_BNHK, _ = x_BN3HK.unbind(2)
            branch = None if aux is None else MaskedSoftmax(aux, aux, aux)
            values_BNHK = v_BNHK.to(x_BN3HK.dtype)
            result = _weighted_sum(q_BNHK, k_BNHK, values_BNHK, _packed_norms(x_BN3HK), "l2", branch, values_BNHK)
            out_BNHK = result.out()
        ctx.save_for_backward(qkv, aux, out_BNHK, *result[1:])
        return out_BNHK, v_BNHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of `qkv` and `aux`."""
        qkv, aux, out_BNHK, factor_BNH1, kv_BHKK, q_length_BNH1, k_length_BNH1 = ctx.saved_tensors
        dtype = out_BNHK.dtype
        grad_qkv = torch.empty_like(qkv, dtype=dtype)
        # Each part serves as a buffer for products until its own gradient is written: no other memory is needed.
        grad_q_BNHK, grad_k_BNHK, grad_v_BNHK = grad_qkv.unbind(2)
        per_token = 1.0 / qkv.shape[1]
        with without_autocast(qkv):
            q_BNHK, k_BNHK, v_BNHK = qkv.to(dtype).unbind(2)
            grad_out = grad_out.to(dtype)
            # Derivative of t / |t|: the part of the gradient that is orthogonal to the output, divided by |t|.
            along_BNH1 = torch.mul(grad_out, out_BNHK, out=grad_q_BNHK).sum(dim=-1, keepdim=True)
            grad_total_BNHK = torch.addcmul(grad_out, out_BNHK, along_BNH1, value=-1).mul_(factor_BNH1)
            grad_total_BHNK = grad_total_BNHK.transpose(1, 2)
            grad_kv_BHKK = _matmul(q_BNHK.permute(0, 2, 3, 1), grad_total_BHNK)

            weighted_BNHK = torch.mul(v_BNHK, 0.5, out=grad_k_BNHK)
            if aux is not None:
                weighted_BNHK.add_(aux.transpose(1, 2))
            grad_length_BNH1 = torch.mul(grad_total_BNHK, weighted_BNHK, out=grad_q_BNHK).sum(dim=-1, keepdim=True)
            q_factor_BNH1 = grad_length_BNH1 * (per_token / q_length_BNH1)
            partial_BNHK = _matmul(grad_total_BHNK, kv_BHKK.transpose(-2, -1)).transpose(1, 2)
            torch.addcmul(partial_BNHK, q_BNHK, q_factor_BNH1, out=grad_q_BNHK)
            del partial_BNHK

            k_scale_BNH1 = per_token / math.pi / k_length_BNH1
            partial_BNHK = _matmul(v_BNHK.transpose(1, 2), grad_kv_BHKK.transpose(-2, -1)).transpose(1, 2)
            along_BNH1 = torch.mul(partial_BNHK, k_BNHK, out=grad_k_BNHK).sum(dim=-1, keepdim=True)
            partial_BNHK.addcmul_(k_BNHK, along_BNH1 / k_length_BNH1.square(), value=-1)
            torch.mul(partial_BNHK, k_scale_BNH1, out=grad_k_BNHK)
            del partial_BNHK

            partial_BNHK = _matmul(k_BNHK.transpose(1, 2), grad_kv_BHKK).transpose(1, 2)
            torch.addcmul(grad_v, partial_BNHK, k_scale_BNH1, out=grad_v_BNHK)
            del partial_BNHK
            weight_BNH1 = q_length_BNH1 * per_token
            grad_v_BNHK.addcmul_(grad_total_BNHK, weight_BNH1, value=0.5)
            grad_aux = None if aux is None else grad_total_BNHK.mul_(weight_BNH1).transpose(1, 2).to(aux.dtype)
        return grad_qkv.to(qkv.dtype), grad_aux


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` over images and heads. For batches > 1 torch copies strided heads; this loop avoids that copy."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(a) == 1:
        return a @ b
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for image in range(len(a)):
        torch.bmm(a[image], b[image], out=out[image])
    return out


def _packed_norms(x_BN3HK: Tensor) -> tuple[Tensor, Tensor]:
    # Over the whole contiguous tensor: over a slice of it, torch's reduction takes five times as long on a CPU.
    q_norm_BNH1, k_norm_BNH1, _ = vector_norm(x_BN3HK).unbind(2)
    return q_norm_BNH1, k_norm_BNH1


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None) -> None:
    four = q.dim() == k.dim() == v.dim() == 4
    paired = four and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not paired or (own is not None and own.shape != (*q.shape[:3], v.shape[3])):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            "q, k, v: expected one common shape (B, H, N, K), or (B, H, M, K), (B, H, N, K), (B, H, N, V) with "
            f"v_at_q of (B, H, M, V), got {shapes}" + ("" if own is None or own is v else f" with {tuple(own.shape)}")
        )


def _check_normalizer(normalizer: str) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r}: expected one of {', '.join(map(repr, NORMALIZERS))}")
