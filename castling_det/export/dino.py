"""DINO as one graph: MMDetection's layers, called with sizes that are part of the graph instead of tensors of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.layers import coordinate_to_encoding, inverse_sigmoid
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.export.dense import RawMaps
from castling_det.export.selection import Detections

__all__ = ["DinoDecoder"]

Sizes = list[tuple[int, int]]
"""Height and width of each level."""


class DinoDecoder(nn.Module):
    """Encoder, query selection, decoder and head of DINO, for images without padding masks.

    Args:
        detector: MMDetection's DINO with a two-stage, box-refining head and sigmoid scores.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        if not detector.as_two_stage or not detector.bbox_head.loss_cls.use_sigmoid:
            raise ValueError("DINO: expected as_two_stage=True and a head with sigmoid scores")
        self.detector = detector
        self.max_per_img = int(detector.test_cfg.get("max_per_img", detector.num_queries))

    def maps(self, features: Sequence[Tensor]) -> RawMaps:
        """`cls_score` (B, Q, K), logits, and `bbox_pred` (B, Q, 4), centre and size over those of the image."""
        model = self.detector
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        x = torch.cat([level.float().flatten(2).transpose(1, 2) for level in features], dim=1)
        positions = [
            model.positional_encoding(None, input=level).flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(features, model.level_embed, strict=True)
        ]
        memory = self._encoded(x, torch.cat(positions, dim=1), sizes)
        scores, boxes = self._decoded(memory, self._selected(memory, sizes), sizes)
        return {"cls_score": scores, "bbox_pred": boxes}

    def forward(self, maps: RawMaps, hw: tuple[int, int]) -> Detections:
        """Detections of images of height and width `hw` from `maps`; there is no suppression and no threshold."""
        logits = maps["cls_score"]
        scores, places = torch.topk(logits.sigmoid().flatten(1), self.max_per_img, dim=1)
        classes = logits.shape[2]
        rows = (places // classes).unsqueeze(-1).expand(-1, -1, 4)
        corners = bbox_cxcywh_to_xyxy(torch.gather(maps["bbox_pred"], 1, rows))
        height, width = hw
        sides = [
            (corners[..., side] * limit).clamp(min=0, max=limit)
            for side, limit in enumerate((width, height, width, height))
        ]
        return Detections(torch.stack(sides, -1), scores, places % classes)

    def _encoded(self, x: Tensor, positions: Tensor, sizes: Sizes) -> Tensor:
        # The same centre on each of the levels.
        references = self._centres(sizes, x).expand(len(sizes), -1, -1).transpose(0, 1).unsqueeze(0)
        for layer in self.detector.encoder.layers:
            x = x + _deformable(layer.self_attn, x + positions, x, references, sizes)
            x = layer.norms[1](layer.ffn(layer.norms[0](x)))
        return x

    def _selected(self, memory: Tensor, sizes: Sizes) -> Tensor:
        """Boxes of the best tokens before the sigmoid, (B, Q, 4)."""
        model = self.detector
        sides = [
            memory.new_ones(height * width, 2) * (0.05 * 2.0**level) for level, (height, width) in enumerate(sizes)
        ]
        proposals = torch.cat([self._centres(sizes, memory)[0], torch.cat(sides)], dim=-1)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(dim=-1, keepdim=True)
        proposals = torch.where(valid, torch.log(proposals / (1 - proposals)), torch.inf)
        tokens = model.memory_trans_norm(model.memory_trans_fc(torch.where(valid, memory, 0.0)))
        last = model.decoder.num_layers
        scores = model.bbox_head.cls_branches[last](tokens).amax(dim=-1)
        boxes = model.bbox_head.reg_branches[last](tokens) + proposals
        places = torch.topk(scores, model.num_queries, dim=1).indices
        return torch.gather(boxes, 1, places.unsqueeze(-1).expand(-1, -1, 4))

    def _decoded(self, memory: Tensor, boxes: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Logits and boxes of the last layer."""
        model, head = self.detector, self.detector.bbox_head
        references = boxes.sigmoid()
        query = model.query_embedding.weight.unsqueeze(0).expand(memory.shape[0], -1, -1)
        layers = model.decoder.layers
        for index, layer in enumerate(layers):
            encoded = coordinate_to_encoding(references, num_feats=query.shape[2])
            position = model.decoder.ref_point_head(encoded)
            query = layer.norms[0](layer.self_attn(query, query, query, query_pos=position, key_pos=position))
            placed = references.unsqueeze(2).expand(-1, -1, len(sizes), -1)
            query = query + _deformable(layer.cross_attn, query + position, memory, placed, sizes)
            query = layer.norms[2](layer.ffn(layer.norms[1](query)))
            if index < len(layers) - 1:
                refined = head.reg_branches[index](query) + inverse_sigmoid(references, eps=1e-3)
                references = refined.sigmoid()
        query = model.decoder.norm(query)
        last = len(layers) - 1
        final = (head.reg_branches[last](query) + inverse_sigmoid(references)).sigmoid()
        return head.cls_branches[last](query), final

    def _centres(self, sizes: Sizes, like: Tensor) -> Tensor:
        """Centre of each token as x, y in [0, 1], (1, N, 2)."""
        levels = []
        for height, width in sizes:
            y = (torch.arange(height, device=like.device) + 0.5) / height
            x = (torch.arange(width, device=like.device) + 0.5) / width
            levels.append(torch.stack([x.expand(height, -1), y.unsqueeze(1).expand(-1, width)], -1).flatten(0, 1))
        return torch.cat(levels).unsqueeze(0)


def _deformable(attention: Any, query: Tensor, value: Tensor, references: Tensor, sizes: Sizes) -> Tensor:
    """mmcv's multi-scale deformable attention without its residual.

    Args:
        attention: mmcv's `MultiScaleDeformableAttention`.
        query: (B, Q, C), position added. value: (B, N, C), all levels.
        references: (B or 1, Q, levels, 2) points, or 4 for boxes; in parts of the image.
        sizes: of the levels.
    """
    heads, points = attention.num_heads, attention.num_points
    value = attention.value_proj(value).unflatten(-1, (heads, -1))
    offsets = attention.sampling_offsets(query).unflatten(-1, (heads, len(sizes), points, 2))
    weights = attention.attention_weights(query).unflatten(-1, (heads, len(sizes) * points)).softmax(dim=-1)
    weights = weights.unflatten(-1, (len(sizes), points))
    start, total = 0, None
    for level, (height, width) in enumerate(sizes):
        reference, shift = references[:, :, level, None, None], offsets[:, :, :, level]
        if references.shape[-1] == 2:
            steps = torch.stack([shift[..., 0] / width, shift[..., 1] / height], dim=-1)
            places = reference + steps
        else:
            places = reference[..., :2] + shift / points * reference[..., 2:] * 0.5
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)
        image = image.unflatten(-1, (height, width)).flatten(0, 1)
        grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        part = (sampled * weight).sum(dim=-1)
        total = part if total is None else total + part
        start = start + height * width
    assert total is not None
    merged = total.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)
    out: Tensor = attention.output_proj(merged)
    return out
