"""Images larger than the network's input, tile by tile, with SAHI's slices and suppression (`castling-det[sahi]`)."""

from __future__ import annotations

import numpy as np
from sahi.postprocess.combine import batched_nms
from sahi.slicing import get_slice_bboxes

from castling_det.runtime.detections import Backend, Detections, Image

__all__ = ["detect_tiled"]


def detect_tiled(
    backend: Backend, image: Image, *, tile: int, overlap: float = 0.2, batch_size: int = 1, ios_threshold: float = 0.5
) -> Detections:
    """Detects in square tiles of side `tile`, `batch_size` at once, and merges; other options as for `Detector`.

    Of two boxes of one class, the lower score is dropped where they share more than `ios_threshold` of the smaller box:
    a tree that a tile's border cuts is inside the whole tree of the neighbouring tile.
    """
    height, width = image.shape[:2]
    tiles = get_slice_bboxes(height, width, tile, tile, overlap_height_ratio=overlap, overlap_width_ratio=overlap)
    rows = []
    for start in range(0, len(tiles), batch_size):
        batch = tiles[start : start + batch_size]
        results = backend.detect([image[top:bottom, left:right] for left, top, right, bottom in batch])
        for (left, top, _, _), found in zip(batch, results, strict=True):
            rows.append(np.column_stack([found.boxes + np.array([left, top, left, top]), found.scores, found.labels]))
    every = np.concatenate(rows)
    kept = every[np.array(batched_nms(every, "IOS", ios_threshold), dtype=np.int64)]
    return Detections(
        kept[:, :4].astype(np.float32), kept[:, 4].astype(np.float32), kept[:, 5].astype(np.int64), backend.classes
    )
