"""The fused twin of a linear detector, and what fusing changes: nothing but rounding, and the time it takes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from castling_det.conversion.manifest import FeatureDrift, FusionRecord
from castling_det.conversion.probes import feature_maps, worse_drift
from castling_det.models import fuse_detector

__all__ = ["FUSION_TOLERANCE", "fused_config", "fused_twin"]

FUSION_TOLERANCE = 1e-3
"""Largest difference of a feature map over its root mean square that rounding may make."""

_REPEATS = 7


def fused_config(config: Config) -> Config:
    """The config that the fused checkpoint loads into strictly."""
    config = copy.deepcopy(config)
    config.model.update(detector=config.model.type, type="castling_det.FusedDetector")
    return config


def fused_twin(linear: nn.Module, batches: Iterable[Tensor]) -> tuple[nn.Module, FusionRecord]:
    """A fused copy of a detector in eval mode, compared and timed against it.

    Args:
        linear: the detector.
        batches: preprocessed images, (1, C, H, W) each; the first one is timed.

    Raises:
        ValueError: nothing to fuse, or a difference beyond `FUSION_TOLERANCE`.
    """
    fused = copy.deepcopy(linear)
    folded = fuse_detector(fused)
    if not folded:
        raise ValueError("the detector has no BatchNorm and no layer scale to fuse; convert it without --fuse")
    drift: dict[str, FeatureDrift] = {}
    shape, latency = (0, 0), (0.0, 0.0)
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            before, after = _maps(linear, batch), _maps(fused, batch)
            for name, feature_map in before.items():
                drift[name] = worse_drift(drift.get(name), feature_map, after[name])
                scale = float(feature_map.double().square().mean().sqrt()) or 1.0
                if not drift[name].max_abs <= FUSION_TOLERANCE * scale:
                    raise ValueError(
                        f"fusing changes {name} by {drift[name].max_abs:.3g}, where its size is {scale:.3g}: more than "
                        "rounding does; convert without --fuse"
                    )
            if index == 0:
                shape = (int(batch.shape[-2]), int(batch.shape[-1]))
                latency = _latencies(partial(_maps, linear, batch), partial(_maps, fused, batch))
    return fused, FusionRecord(folded, drift, shape, torch.get_num_threads(), *latency)


def _maps(model: Any, batch: Tensor) -> dict[str, Tensor]:
    """Of backbone, neck and, where it has maps, head."""
    maps = feature_maps(model, batch)
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    if head is not None and getattr(model, "encoder", None) is None:
        inputs = tuple(value for name, value in maps.items() if name.startswith("neck")) or tuple(maps.values())
        outputs = (level for group in head(inputs) for level in group)
        maps |= {f"head.{index}": output for index, output in enumerate(outputs)}
    return maps


def _latencies(*calls: Callable[[], Any]) -> tuple[float, float]:
    """Median milliseconds of each, in turns, so that a busy machine slows all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_REPEATS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[index].append(1000 * (time.perf_counter() - start))
    before, after = (round(statistics.median(samples), 3) for samples in times)
    return before, after
