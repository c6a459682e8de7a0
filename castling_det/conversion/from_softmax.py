"""A trained softmax detector becomes the start of a short castling training, which ends in linear attention."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from castling_det import __version__
from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.deploy_file import meta_of, serialised, versions, weights_record
from castling_det.conversion.detectors import (
    build_detector,
    load_config,
    load_exactly,
    trained_attention,
    with_attention,
)
from castling_det.conversion.manifest import FeatureDrift, FileRecord, ProbeRecord, WeightsRecord, table
from castling_det.conversion.output import check_paths, write_with_record
from castling_det.conversion.probes import Probes, files_to_probe, measure, probe_shape
from castling_det.conversion.weights import select_weights
from castling_det.engine.mask_annealing import MaskAnnealingHook, mask_state
from castling_det.files import sha256_of
from castling_det.layers import MaskState, attention_layers

__all__ = ["StartRecord", "start_from_softmax"]

_HOOK = "castling_det.MaskAnnealingHook"
_CLOSE = 0.05
"""Relative RMS of a feature map up to which a start is called close to the softmax detector."""


@dataclass(frozen=True)
class StartRecord:
    """All that is known of one start, written as JSON beside it."""

    source: FileRecord
    output: FileRecord
    config: str
    weights: WeightsRecord
    threshold: float
    """Of the mask in the first iteration, in the layers' unit."""
    aux_scale: float
    """Factor on the softmax branch in the first iteration."""
    probes: ProbeRecord
    drift: dict[str, FeatureDrift]
    """By feature map: the first iteration's against the softmax detector's."""
    drift_linear: dict[str, FeatureDrift]
    """As `drift`, with linear attention alone: what the training has to make up for."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    command: str
    notes: tuple[str, ...]

    @property
    def relative_drift(self) -> float:
        """Largest relative RMS of `drift`."""
        return max(drift.relative_rms for drift in self.drift.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """A short table for people."""
        rows = {
            "source": self.source.path,
            "output": self.output.path,
            "mask": f"threshold {self.threshold:g}, factor {self.aux_scale:g}",
            "probe images": f"{len(self.probes.images)} {self.probes.kind}",
            **{
                f"drift {name}": f"{drift.relative_rms:.2%} RMS at the start, "
                f"{self.drift_linear[name].relative_rms:.2%} with linear attention alone"
                for name, drift in self.drift.items()
            },
        }
        return table(rows, self.notes)


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
) -> StartRecord:
    """Writes initial weights `out` for a castling training, and the record beside it.

    The parameters are the source's: all modes share them. What makes the start close to the softmax detector is how the
    config begins, and that is measured: `normalizer="kernel"`, `threshold=0` and a MaskAnnealingHook with a `share`
    near 1.

    Args:
        config: of the castling training, with a MaskAnnealingHook.
        source: checkpoint of a training with `attention="softmax"` of the same detector.
        out: file to write, for `load_from`.
        weights, probe_images, num_probes, shape, command: as for `convert`.

    Raises:
        ValueError: unusable file, config or option. `out` is as it was.
        OSError: `out` cannot be written. An older `out` is as it was.
    """
    source, out = Path(source), Path(out)
    check_paths(source, out)
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes}: expected at least 1")
    training = load_config(config)
    checkpoint = load_checkpoint(source)
    meta = meta_of(checkpoint, source)
    modes = trained_attention(meta)
    if modes and modes != {"softmax"}:
        raise ValueError(
            f"checkpoint {source}: its meta says attention={', '.join(sorted(modes))!r}: expected a detector trained "
            "with attention='softmax'; a castling one is converted without --from-softmax"
        )
    picked = select_weights(checkpoint, source, weights)
    castling_config = with_attention(training, "castling")
    castling, softmax, linear = (
        build_detector(with_attention(training, mode)) for mode in ("castling", "softmax", "linear")
    )
    for model in (castling, softmax, linear):
        load_exactly(model, picked.tensors, source)
    state = _set_first_mask(castling, training)
    shape, notes = probe_shape(training, shape)
    files = files_to_probe(probe_images, num_probes) if probe_images else ()
    probes = Probes(files, num_probes, shape)
    at_start, alone = (measure(castling_config, probes, softmax, model) for model in (castling, linear))
    digest = sha256_of(source)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    origin = {"source_sha256": digest, "weights": picked.kind, "castling_det": __version__, "created": created}
    content = serialised(castling, castling_config, meta, origin, key="from_softmax")
    record = StartRecord(
        source=FileRecord(str(source), digest, source.stat().st_size),
        output=FileRecord(str(out), hashlib.sha256(content).hexdigest(), len(content)),
        config=str(training.filename),
        weights=weights_record(checkpoint, picked, castling),
        threshold=state.threshold,
        aux_scale=state.aux_scale,
        probes=at_start.probes,
        drift=at_start.drift,
        drift_linear=alone.drift,
        versions=versions(),
        created=created,
        command=command,
        notes=(),
    )
    if record.relative_drift > _CLOSE:
        notes.append(
            f"the first iteration is {record.relative_drift:.0%} RMS away from the softmax detector; closest is "
            "normalizer='kernel', threshold=0.0 in the backbone and MaskAnnealingHook(schedule='constant', share=0.99)"
        )
    record = dataclasses.replace(record, notes=tuple(notes))
    write_with_record(out, content, record.to_json())
    return record


def _set_first_mask(castling: Any, config: Config) -> MaskState:
    """Puts every layer where the config's hook has it in the first iteration, with the branch on."""
    found = [dict(hook) for hook in config.get("custom_hooks") or [] if hook.get("type") == _HOOK]
    if len(found) != 1:
        raise ValueError(
            f"config {config.filename}: {len(found)} MaskAnnealingHooks in custom_hooks: expected one, which takes the "
            "softmax branch away; see configs/castling_vit/*castling-from-softmax*"
        )
    options = {key: value for key, value in found[0].items() if key not in ("type", "priority")}
    hook = MaskAnnealingHook(**options)
    layers = attention_layers(castling, "castling").values()
    state = MaskState(0.0)
    for layer in layers:
        start = layer.options.threshold if hook.start is None else hook.start
        # At the ramp's beginning its end does not count.
        state = mask_state(
            0.0,
            schedule="constant",
            start=start,
            end=1.0,
            threshold_unit=layer.options.threshold_unit,
            begin=hook.begin,
            empty_from=hook.empty_from,
            fade=hook.fade,
            share=hook.share,
        )
        layer.mask_state = state
        layer.eval_aux = True
    return state
