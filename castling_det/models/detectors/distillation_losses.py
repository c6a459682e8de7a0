"""How far a student's maps, scores and boxes are from a teacher's; lists have one map for each level of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["box_loss", "feature_loss", "score_loss"]


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the maps (B, C, H, W) over the teacher's mean square, mean over levels."""
    ratios = [F.mse_loss(own, other) / other.square().mean() for own, other in zip(student, teacher, strict=True)]
    return torch.stack(ratios).mean()


def score_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Cross entropy of the sigmoids of (B, classes, H, W), weighted by their squared difference as in quality focal
    loss, for each object that the teacher sees."""
    own, other = _flat(student), _flat(teacher).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(own, other, reduction="none")
    return (entropy * (own.sigmoid() - other).square()).sum() / _objects(other)


def box_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], teacher_scores: Sequence[Tensor], *, bins: int | None = None
) -> Tensor:
    """Difference of the boxes (B, 4 * bins, H, W) where the teacher sees something, weighted by its best score.

    Args:
        student, teacher: outputs of the head's box branch.
        teacher_scores: its logits, (B, classes, H, W).
        bins: values of the distribution of each side; Kullback-Leibler divergence then. None: smooth L1 of the outputs.
    """
    own, other, scores = _flat(student), _flat(teacher), _flat(teacher_scores).sigmoid()
    weight = scores.amax(dim=-1)
    if bins is not None and own.shape[-1] == 4 * bins:
        own, other = (x.unflatten(-1, (4, bins)).log_softmax(dim=-1) for x in (own, other))
        difference = F.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)
    else:
        difference = F.smooth_l1_loss(own, other, reduction="none").mean(dim=-1)
    return (difference * weight).sum() / _objects(scores)


def _flat(levels: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W) of all levels as (B, places, C)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def _objects(scores: Tensor) -> Tensor:
    """How many objects the teacher sees in the batch: the sum of the best scores, at least 1."""
    return scores.amax(dim=-1).sum().clamp_min(1.0)
