"""Heads and their label assignment, registered in `castling_det.registry`."""

from castling_det.models.heads.pico_head import PicoHead
from castling_det.models.heads.varifocal_sim_ota import VarifocalSimOTAAssigner

__all__ = ["PicoHead", "VarifocalSimOTAAssigner"]
