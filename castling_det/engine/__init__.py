"""Hooks and optimizer settings that a training adds; importing this registers them."""

from castling_det.engine.ema import CycleEMAHook
from castling_det.engine.hooks import ClassCountHook, DashboardHook, ExactResumeHook, WholeCheckpointHook
from castling_det.engine.layer_decay import LayerDecayOptimWrapperConstructor
from castling_det.engine.mask_annealing import META_KEY, SCHEDULES, MaskAnnealingHook, mask_state

__all__ = [
    "META_KEY",
    "SCHEDULES",
    "ClassCountHook",
    "CycleEMAHook",
    "DashboardHook",
    "ExactResumeHook",
    "LayerDecayOptimWrapperConstructor",
    "MaskAnnealingHook",
    "WholeCheckpointHook",
    "mask_state",
]
