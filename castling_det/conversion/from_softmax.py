"""A trained softmax detector becomes the start of a short castling training, which ends in linear attention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from castling_det.conversion.convert import Job
from castling_det.conversion.detectors import (
    build_detector,
    load_exactly,
    load_weights,
    trained_attention,
    with_attention,
)
from castling_det.conversion.manifest import Manifest, MaskRecord
from castling_det.conversion.mask_proof import measure
from castling_det.engine.mask_annealing import MaskAnnealingHook, mask_state
from castling_det.layers import MaskState, attention_layers

__all__ = ["start_from_softmax"]

_HOOK = "castling_det.MaskAnnealingHook"
_CLOSE = 0.05
"""Relative RMS of a feature map up to which a start is called close to the softmax detector."""


def start_from_softmax(
    config: str | os.PathLike[str] | Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "auto",
    probe_images: Sequence[str | os.PathLike[str]] = (),
    num_probes: int = 4,
    shape: tuple[int, int] | None = None,
    command: str = "",
) -> Manifest:
    """Writes initial weights `out` for a castling training, and the manifest beside it.

    All modes share the parameters of the source. `normalizer="kernel"`, `threshold=0` and a MaskAnnealingHook with a
    `share` near 1 in the config make the start close to the softmax detector; the manifest says how close.

    Args:
        config: of the castling training, with a MaskAnnealingHook.
        source: checkpoint of a training with `attention="softmax"` of the same detector.
        out: file to write, for `load_from`.
        weights, probe_images, num_probes, shape, command: as for `convert`.

    Raises:
        ValueError: unusable file, config or option. `out` is as it was.
        OSError: `out` cannot be written. An older `out` is as it was.
    """
    if Path(out).suffix == ".safetensors":
        raise ValueError(f"output {out}: expected a .pth file, which MMEngine loads at the start of the training")
    job = Job.prepared(config, source, out, probe_images, num_probes, shape)
    modes = trained_attention(job.meta)
    if modes and modes != {"softmax"}:
        raise ValueError(
            f"checkpoint {source}: its meta says attention={', '.join(sorted(modes))!r}: expected a detector trained "
            "with attention='softmax'; a castling one is converted without --from-softmax"
        )
    castling_config = with_attention(job.config, "castling")
    softmax, castling = build_detector(with_attention(job.config, "softmax")), build_detector(castling_config)
    picked, notes = load_weights(softmax, job.checkpoint, source, weights)
    load_exactly(castling, picked.tensors, source)
    alone = measure(castling_config, job.probes, softmax, castling)  # in eval mode without its softmax branch
    state = set_first_mask(castling, job.config)
    measured = measure(castling_config, job.probes, softmax, castling)
    drift = max(drift.relative_rms for drift in measured.drift.values())
    if drift > _CLOSE:
        notes.append(
            f"the first iteration is {drift:.0%} RMS away from the softmax detector; closest is "
            "normalizer='kernel', threshold=0.0 in the backbone and MaskAnnealingHook(schedule='constant', share=0.99)"
        )
    mask = MaskRecord(state.threshold, state.threshold_unit, state.aux_scale, "config", empty_by=None, layers={})
    done: tuple[str, dict[str, Any]] = ("from_softmax", {})
    return job.write(castling, castling_config, picked, done, measured, mask, notes, command, drift_linear=alone.drift)


def set_first_mask(castling: nn.Module, config: Config) -> MaskState:
    """Puts every layer where the config's hook has it in the first iteration, with the branch on."""
    found = [dict(hook) for hook in config.get("custom_hooks") or [] if hook.get("type") == _HOOK]
    if len(found) != 1:
        raise ValueError(
            f"config {config.filename}: {len(found)} MaskAnnealingHooks in custom_hooks: expected one, which takes the "
            "softmax branch away; see configs/castling_vit/*castling-from-softmax*"
        )
    hook = MaskAnnealingHook(**{key: value for key, value in found[0].items() if key not in ("type", "priority")})
    layers = attention_layers(castling, "castling").values()
    options = next(iter(layers)).options
    state = mask_state(
        0.0,
        schedule="constant",  # the end of the ramp does not count yet
        start=options.threshold if hook.start is None else hook.start,
        end=1.0,
        threshold_unit=options.threshold_unit,
        begin=hook.begin,
        empty_from=hook.empty_from,
        fade=hook.fade,
        share=hook.share,
    )
    for layer in layers:
        layer.mask_state, layer.eval_aux = state, True
    return state
