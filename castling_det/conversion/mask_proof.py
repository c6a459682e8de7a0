"""Whether the softmax branch of a trained hybrid is gone, and how that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from castling_det.conversion.manifest import MaskRecord
from castling_det.conversion.probes import Measurement
from castling_det.layers import THRESHOLD_UNITS, attention_layers
from castling_det.layers import MaskState as LayerMaskState

__all__ = ["MaskState", "limits", "nonempty_message", "prove", "set_mask"]


class MaskState(NamedTuple):
    """Where the mask stood when the checkpoint was saved."""

    threshold: float
    threshold_unit: str
    aux_scale: float
    origin: str
    """`"checkpoint"` or `"config"`."""


def set_mask(hybrid: nn.Module, meta: Mapping[str, Any], source: object) -> MaskState:
    """Puts every castling layer where the training left it: by MaskAnnealingHook's record, or by the config.

    Raises:
        ValueError: the record is incomplete or out of range.
    """
    layers = attention_layers(hybrid, "castling").values()
    record = (meta.get("castling_det") or {}).get("mask")
    if record is None:
        layer = next(iter(layers))
        own = layer.mask_state
        state = MaskState(own.threshold, own.threshold_unit, own.aux_scale, "config")
    else:
        state = _recorded(record, source)
    for layer in layers:
        layer.mask_state = LayerMaskState(*state[:3])
        layer.eval_aux = True
    return state


def _recorded(record: Mapping[str, Any], source: object) -> MaskState:
    where = f"checkpoint {source}: meta['castling_det']['mask']"
    threshold, unit, aux_scale = (record.get(key) for key in ("threshold", "threshold_unit", "aux_scale"))
    if not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise ValueError(f"{where}['threshold']={threshold!r}: expected a number >= 0, as MaskAnnealingHook writes")
    if unit not in THRESHOLD_UNITS:
        raise ValueError(f"{where}['threshold_unit']={unit!r}: expected one of {', '.join(THRESHOLD_UNITS)}")
    if not isinstance(aux_scale, (int, float)) or not 0 <= aux_scale < math.inf:
        raise ValueError(f"{where}['aux_scale']={aux_scale!r}: expected a finite factor >= 0")
    return MaskState(float(threshold), str(unit), float(aux_scale), "checkpoint")


def prove(hybrid: nn.Module, state: MaskState, measured: Measurement) -> MaskRecord:
    """Why the mask is empty: by the threshold or the factor for any input, or by real probe images."""
    layers = attention_layers(hybrid, "castling")
    empty_by = None
    if state.aux_scale == 0:
        empty_by = "aux_scale"
    elif all(layer.mask_state.is_empty(measured.layers[name].tokens) for name, layer in layers.items()):
        empty_by = "threshold"
    elif measured.probes.kind == "files" and not any(layer.kept_fraction for layer in measured.layers.values()):
        empty_by = "probe images"
    return MaskRecord(*state, empty_by=empty_by, layers=measured.layers)


def limits(mask: MaskRecord) -> list[str]:
    """What the record does not cover, for the manifest's notes."""
    notes = []
    if mask.origin == "config":
        notes.append(
            "the checkpoint does not say where its mask stood (no MaskAnnealingHook): the config's threshold was taken"
        )
    if mask.empty_by == "threshold" and mask.threshold_unit == "uniform" and math.isfinite(mask.threshold):
        notes.append(f"the mask is empty for maps of up to {math.floor(mask.threshold)} tokens")
    if mask.empty_by == "probe images":
        notes.append("nothing passed the mask on the probe images; other images may differ")
    return notes


def nonempty_message(mask: MaskRecord, measured: Measurement) -> str:
    """What is not proven, with the drift that conversion causes."""
    name, drift = max(measured.drift.items(), key=lambda item: item[1].relative_rms)
    number = len(measured.probes.images)
    if mask.kept_fraction == 0:
        return (
            f"threshold {mask.threshold:g} ({mask.threshold_unit}) does not empty the mask for certain, and "
            f"nothing passing on {number} generated images is no proof; give real ones with --probe-images"
        )
    layer, kept = max(mask.layers.items(), key=lambda item: item[1].kept_fraction)
    return (
        f"the mask is not empty (threshold {mask.threshold:g} {mask.threshold_unit}): {layer} keeps "
        f"{kept.kept_fraction:.3%} of the probabilities, {kept.kept_mass:.1%} of the mass, on {number} "
        f"{measured.probes.kind} probe images. Without the softmax branch {name} changes by "
        f"{drift.relative_rms:.2%} RMS, {drift.max_abs:.3g} at most. Train on until the mask is empty"
    )
