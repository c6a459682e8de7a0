"""What takes part in a training: the mask's schedule, checks before the first iteration, layer-wise learning rates."""

from castling_det.engine.class_count import ClassCountHook
from castling_det.engine.cycle_ema import CycleEMAHook
from castling_det.engine.dashboard import DashboardHook
from castling_det.engine.layer_decay import LayerDecayOptimWrapperConstructor
from castling_det.engine.mask_annealing import MaskAnnealingHook
from castling_det.engine.schedules import SCHEDULES, MaskState, mask_state

__all__ = [
    "SCHEDULES",
    "ClassCountHook",
    "CycleEMAHook",
    "DashboardHook",
    "LayerDecayOptimWrapperConstructor",
    "MaskAnnealingHook",
    "MaskState",
    "mask_state",
]
