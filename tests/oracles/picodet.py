"""PicoDet's assignment and losses from their equations, one prior and one box at a time.

Varifocal loss (arXiv 2008.13367, eq. 2), distribution focal loss (arXiv 2006.04388, eq. 6), GIoU loss (arXiv
1902.09630), SimOTA (arXiv 2107.08430) with PicoDet's cost (arXiv 2111.00902, eq. 2). Numbers are 0-d float64 tensors.
"""

from __future__ import annotations

import torch

UNPREFERRED = 1e5
"""Added to the cost of a candidate that is not both in the box and near its centre."""


def iou_and_giou(a, b):
    """Of two boxes (x1, y1, x2, y2)."""

    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    overlap = [torch.minimum(a[2 + axis], b[2 + axis]) - torch.maximum(a[axis], b[axis]) for axis in (0, 1)]
    shared = overlap[0].clamp(min=0) * overlap[1].clamp(min=0)
    hull = [torch.maximum(a[2 + axis], b[2 + axis]) - torch.minimum(a[axis], b[axis]) for axis in (0, 1)]
    union = area(a) + area(b) - shared
    return shared / union, shared / union - (hull[0] * hull[1] - union) / (hull[0] * hull[1])


def varifocal(p, q, alpha=0.75, gamma=2.0):
    """Of a probability p and a target q: -q (q log p + (1 - q) log(1 - p)), or -alpha p^gamma log(1 - p) for q = 0."""
    if q > 0:
        return -q * (q * p.log() + (1 - q) * (1 - p).log())
    return -alpha * p**gamma * (1 - p).log()


def distribution_focal(logits, distance):
    """Cross entropy to the two bins beside the distance, each weighted by how near it is."""
    log_p = logits.log_softmax(0)
    left = int(distance)
    return -(left + 1 - distance) * log_p[left] - (distance - left) * log_p[left + 1]


def sim_ota(scores, boxes, priors, truth, labels, *, radius=2.5, topk=10, iou_weight=6.0):
    """For each prior (x, y, stride) 0 or one more than the index of its box, and how many were asked for by several."""
    inside, near = {}, {}
    for i, (x, y, stride) in enumerate(priors):
        for j, (x1, y1, x2, y2) in enumerate(truth):
            inside[i, j] = bool(x1 < x < x2 and y1 < y < y2)
            reach = radius * stride
            near[i, j] = bool(abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach)
    boxes_of = range(len(truth))
    candidates = [i for i in range(len(priors)) if any(inside[i, j] or near[i, j] for j in boxes_of)]
    cost, iou = {}, {}
    for i in candidates:
        for j in boxes_of:
            iou[i, j], giou = iou_and_giou(boxes[i], truth[j])
            targets = [iou[i, j] if k == labels[j] else torch.zeros(()) for k in range(scores.shape[1])]
            classification = sum(varifocal(p, q) for p, q in zip(scores[i], targets, strict=True))
            unpreferred = 0 if inside[i, j] and near[i, j] else UNPREFERRED
            cost[i, j] = float(classification + iou_weight * (1 - giou) + unpreferred)
    asked = {i: 0 for i in candidates}
    matched = {}
    for j in boxes_of:
        best = sorted((float(iou[i, j]) for i in candidates), reverse=True)[:topk]
        for i in sorted(candidates, key=lambda i: cost[i, j])[: max(1, int(sum(best)))]:
            asked[i] += 1
            matched[i] = j
    conflicts = [i for i, count in asked.items() if count > 1]
    for i in conflicts:
        matched[i] = min(boxes_of, key=lambda j: cost[i, j])
    return [matched.get(i, -1) + 1 for i in range(len(priors))], len(conflicts)


def losses(cls_scores, bbox_preds, truths, strides, *, reg_max, offset=0.5, target="iou"):
    """The three losses of a batch, and the matches of each image.

    Args:
        cls_scores: logits of each level, (B, K, H, W). bbox_preds: (B, 4 * (reg_max + 1), H, W).
        truths: boxes (G, 4) and labels (G,) of each image.
        target: `"iou"`, or `"one"` for a wrong variant: the bare label as the varifocal target.
    """
    bins = torch.arange(reg_max + 1, dtype=torch.float64)
    matches, positives = [], 0
    sums = {"loss_cls": 0.0, "loss_bbox": 0.0, "loss_dfl": 0.0}
    total_weight = 0.0
    for image, (truth, labels) in enumerate(truths):
        priors, logits, corners = [], [], []
        for scores, boxes, stride in zip(cls_scores, bbox_preds, strides, strict=True):
            for row in range(scores.shape[2]):
                for column in range(scores.shape[3]):
                    priors.append(((column + offset) * stride, (row + offset) * stride, stride))
                    logits.append(scores[image, :, row, column])
                    corners.append(boxes[image, :, row, column].reshape(4, reg_max + 1))
        distances = [(corner.softmax(1) * bins).sum(1) for corner in corners]
        decoded = [
            torch.stack([x / s - d[0], y / s - d[1], x / s + d[2], y / s + d[3]])
            for (x, y, s), d in zip(priors, distances, strict=True)
        ]
        probabilities = torch.stack(logits).sigmoid()
        in_pixels = [box.detach() * s for box, (_, _, s) in zip(decoded, priors, strict=True)]
        match, _ = sim_ota(probabilities.detach(), in_pixels, priors, truth, labels) if len(truth) else (
            [0] * len(priors), 0
        )  # fmt: skip
        matches.append(match)
        positives += max(1, sum(j > 0 for j in match))
        for (x, y, s), j, box, corner, p in zip(priors, match, decoded, corners, probabilities, strict=True):
            quality = torch.zeros(len(p), dtype=torch.float64)
            if j:
                goal = truth[j - 1] / s
                iou, giou = iou_and_giou(box, goal)
                quality[labels[j - 1]] = iou.detach() if target == "iou" else 1
                weight = p.detach().max()
                total_weight += weight
                sums["loss_bbox"] += 2 * weight * (1 - giou)
                sides = [x / s - goal[0], y / s - goal[1], goal[2] - x / s, goal[3] - y / s]
                for side, logit in zip(sides, corner, strict=True):
                    sums["loss_dfl"] += 0.25 * weight * distribution_focal(logit, side.clamp(0, reg_max - 0.1)) / 4
            sums["loss_cls"] += sum(varifocal(one, q) for one, q in zip(p, quality, strict=True))
    sums["loss_cls"] /= positives
    for name in ("loss_bbox", "loss_dfl"):
        sums[name] = sums[name] / max(float(total_weight), 1.0)
    return sums, matches
