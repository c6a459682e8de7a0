"""Sigmoid focal loss (Lin et al., ICCV 2017, arXiv 1708.02002) in the closed form of mmcv's CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["sigmoid_focal_loss_backward", "sigmoid_focal_loss_forward"]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the loss of each logit to `output`.

    Args:
        input: logits (N, C).
        target: class of each row, int64 (N,); a value outside 0..C-1 is background.
        weight: a factor for each class, (C,), or empty; background has the factor 1.
        output: (N, C).
    """
    x, positive, p, q, log_p, log_q = _terms(input, target)
    loss = -torch.where(positive, alpha * q.pow(gamma) * log_p, (1 - alpha) * p.pow(gamma) * log_q)
    output.copy_(loss * _row_weight(weight, target, x))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the derivative of each loss by its own logit to `grad_input`, (N, C)."""
    x, positive, p, q, log_p, log_q = _terms(input, target)
    of_positive = alpha * q.pow(gamma) * (q - gamma * p * log_p)
    of_negative = (1 - alpha) * p.pow(gamma) * (gamma * q * log_q - p)
    grad_input.copy_(-torch.where(positive, of_positive, of_negative) * _row_weight(weight, target, x))


def _terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    return x, positive, x.sigmoid(), (-x).sigmoid(), F.logsigmoid(x), F.logsigmoid(-x)


def _row_weight(weight: Tensor, target: Tensor, x: Tensor) -> Tensor:
    if weight.numel() == 0:
        return x.new_ones(())
    classes = x.shape[1]
    background = (target < 0) | (target >= classes)
    row = torch.cat([weight.to(x), x.new_ones(1)])[torch.where(background, classes, target)]
    return row[:, None]
