"""The record of a conversion, written as JSON beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

__all__ = ["Drift", "FileRecord", "LayerMask", "Manifest", "MaskRecord", "ProbeRecord"]


@dataclass(frozen=True)
class FileRecord:
    """A file as it was read or written."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class LayerMask:
    """The most that the mask of one layer kept on any probe image, of the N x N probabilities of N `tokens`."""

    kept_fraction: float
    """Share of the probabilities, in [0, 1]."""
    kept_mass: float
    """Kept probability of a row, mean over rows, in [0, 1]."""
    tokens: int


@dataclass(frozen=True)
class MaskRecord:
    """The mask of the softmax branch, and whether it is empty."""

    threshold: float
    """In `threshold_unit`; may be infinite, which JSON says as the text `"inf"`."""
    threshold_unit: str
    aux_scale: float
    """Factor on the softmax branch, >= 0."""
    origin: str
    """Where these came from: `"checkpoint"` (MaskAnnealingHook's record) or `"config"`."""
    empty_by: str | None
    """`"threshold"`, `"aux_scale"`: empty for any input. `"probe images"`: on real images. None: not known to be."""
    layers: dict[str, LayerMask]
    ramp: float = 0.0
    """How far each layer was from `threshold` to a probability of 1, in the logarithm of the probability."""

    @property
    def kept_fraction(self) -> float:
        """Largest kept fraction of any layer."""
        return max((layer.kept_fraction for layer in self.layers.values()), default=0.0)


@dataclass(frozen=True)
class Drift:
    """Largest difference of one feature map between two detectors; `relative_rms` is over the first one's RMS."""

    channels: int
    max_abs: float
    relative_rms: float


@dataclass(frozen=True)
class ProbeRecord:
    """The images that were measured on: `"files"` through the config's test pipeline, or `"generated"` noise."""

    kind: str
    images: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Height and width of each as the network saw it, in pixels."""
    different: int
    """Images that are neither of one colour nor equal to one before."""


@dataclass(frozen=True)
class Manifest:
    """All that is known of one conversion, or of the start of a castling training from a softmax detector."""

    source: FileRecord
    output: FileRecord
    config: str
    weights: dict[str, Any]
    """Which weights were taken (`kind`, `key`), how many `tensors`, and the reason for every entry `dropped`."""
    mask: MaskRecord
    probes: ProbeRecord
    drift: dict[str, Drift]
    """By feature map, such as `backbone.0` and `neck.2`: the written detector against the source's."""
    drift_linear: dict[str, Drift] | None
    """Of a start: linear attention alone against the softmax detector, which the training has to make up for."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    command: str
    notes: tuple[str, ...]
    format: int = 2

    @property
    def max_abs_drift(self) -> float:
        """Largest absolute difference of any map; 0.0 when conversion is exact on the probes."""
        return max(drift.max_abs for drift in self.drift.values())

    @property
    def relative_drift(self) -> float:
        """Largest relative RMS of any map."""
        return max(drift.relative_rms for drift in self.drift.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        record: dict[str, Any] = msgspec.to_builtins(self)
        threshold = self.mask.threshold if self.mask.threshold < float("inf") else "inf"
        record["mask"] |= {"kept_fraction": self.mask.kept_fraction, "threshold": threshold}
        return record | {"max_abs_drift": self.max_abs_drift}

    def summary(self) -> str:
        """A short table for people."""
        mask = self.mask
        rows = {
            "source": f"{self.source.path} ({self.source.bytes / 1e6:.1f} MB, weights: {self.weights['kind']})",
            "output": f"{self.output.path} ({self.output.bytes / 1e6:.1f} MB)",
            "mask": f"threshold {mask.threshold:g} {mask.threshold_unit}, factor {mask.aux_scale:g}",
            "probe images": f"{len(self.probes.images)} {self.probes.kind}",
        }
        if self.drift_linear is None:
            empty = f"yes, by {mask.empty_by}" if mask.empty_by else "NO" if mask.kept_fraction else "not proven"
            rows["mask empty"] = f"{empty}; largest kept fraction {mask.kept_fraction:.3g}"
        for name, drift in self.drift.items():
            rows[f"drift {name}"] = f"{drift.max_abs:.3g} ({drift.relative_rms:.2%} RMS)"
        for name, drift in (self.drift_linear or {}).items():
            rows[f"drift {name}"] += f", {drift.relative_rms:.2%} RMS with linear attention alone"
        column = max(map(len, rows))
        lines = [f"{name:<{column}}  {text}" for name, text in rows.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
