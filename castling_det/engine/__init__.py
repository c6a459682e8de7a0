"""What takes part in a training: the mask's schedule, checks before the first iteration, layer-wise learning rates."""

from castling_det.engine.bf16 import Bf16OptimWrapper
from castling_det.engine.class_count import ClassCountHook
from castling_det.engine.cycle_ema import CycleEMAHook
from castling_det.engine.dashboard import DashboardHook
from castling_det.engine.exact_resume import ExactResumeHook
from castling_det.engine.fp16 import Fp16OptimWrapper
from castling_det.engine.layer_decay import LayerDecayOptimWrapperConstructor
from castling_det.engine.mask_annealing import META_KEY, SCHEDULES, MaskAnnealingHook, mask_state
from castling_det.engine.whole_checkpoint import WholeCheckpointHook

__all__ = [
    "META_KEY",
    "SCHEDULES",
    "Bf16OptimWrapper",
    "ClassCountHook",
    "CycleEMAHook",
    "DashboardHook",
    "ExactResumeHook",
    "Fp16OptimWrapper",
    "LayerDecayOptimWrapperConstructor",
    "MaskAnnealingHook",
    "WholeCheckpointHook",
    "mask_state",
]
