"""The record of a conversion, written as JSON beside the converted checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FeatureDrift",
    "FileRecord",
    "FusionRecord",
    "LayerMask",
    "Macs",
    "Manifest",
    "MaskRecord",
    "ProbeRecord",
    "WeightsRecord",
    "table",
]

FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """A file as it was read or written."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class WeightsRecord:
    """Which weights of the source were taken, and what became of the rest."""

    kind: str
    """`"ema"`, `"online"`, or `"only"` when the source has one set."""
    key: str
    """Entry of the source they were read from."""
    tensors: int
    parameters: int
    """Elements of the deployed model's parameters."""
    dropped: dict[str, str]
    """Entries of the source that were left out: the reason."""


@dataclass(frozen=True)
class LayerMask:
    """What the mask of one layer let through, at most, over the probe images."""

    kept_fraction: float
    """Share of the N x N probabilities, in [0, 1]."""
    kept_mass: float
    """Kept probability of a row, mean over rows, in [0, 1]."""
    tokens: int
    """Largest N of the probes."""


@dataclass(frozen=True)
class MaskRecord:
    """Whether conversion is exact, and how that is known."""

    threshold: float
    """In `threshold_unit`; may be infinite."""
    threshold_unit: str
    aux_scale: float
    """Factor on the softmax branch, >= 0."""
    origin: str
    """Where the three came from: `"checkpoint"` (MaskAnnealingHook's record) or `"config"`."""
    empty_by: str | None
    """`"threshold"`, `"aux_scale"`: empty for any input. `"probe images"`: on real ones. None: not empty."""
    layers: dict[str, LayerMask]

    @property
    def kept_fraction(self) -> float:
        """Largest kept fraction of any layer."""
        return max(layer.kept_fraction for layer in self.layers.values())


@dataclass(frozen=True)
class FeatureDrift:
    """Difference of one feature map between hybrid (softmax branch on) and linear, over the probe images."""

    channels: int
    max_abs: float
    relative_rms: float
    """RMS of the difference over RMS of the hybrid's map."""


@dataclass(frozen=True)
class ProbeRecord:
    """The images that occupancy and drift were measured on."""

    kind: str
    """`"files"`, through the config's test pipeline, or `"generated"` noise."""
    images: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """Height and width of each as the network saw it, in pixels."""
    seed: int | None


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one image of `shape`; before with the softmax branch of training, after without."""

    shape: tuple[int, int]
    """Height and width in pixels."""
    before: int
    after: int


@dataclass(frozen=True)
class FusionRecord:
    """What was folded into the layers before it, and what that changed."""

    folded: dict[str, int]
    """Number of norms and scales, by kind."""
    drift: dict[str, FeatureDrift]
    """Rounding: difference of each map of backbone, neck and head, over the probe images."""
    shape: tuple[int, int]
    """Height and width in pixels of the image that was timed."""
    threads: int
    before_ms: float
    """Median milliseconds of backbone, neck and head, one image on this machine's CPU."""
    after_ms: float

    @property
    def max_abs_drift(self) -> float:
        """Largest absolute difference of any map."""
        return max(drift.max_abs for drift in self.drift.values())


@dataclass(frozen=True)
class Manifest:
    """All that is known of one conversion."""

    source: FileRecord
    output: FileRecord
    config: str
    weights: WeightsRecord
    mask: MaskRecord
    probes: ProbeRecord
    drift: dict[str, FeatureDrift]
    """By feature map, such as `backbone.0` and `neck.2`."""
    macs: Macs | None
    """None where a part of the detector has no known multiply-adds; `notes` names it."""
    versions: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    command: str
    notes: tuple[str, ...]
    fusion: FusionRecord | None = None
    """None where the checkpoint keeps its norms."""
    format: int = FORMAT

    @property
    def max_abs_drift(self) -> float:
        """Largest absolute feature difference of any map; 0.0 when conversion is exact on the probes."""
        return max(drift.max_abs for drift in self.drift.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite threshold becomes the string `"inf"`."""
        record = dataclasses.asdict(self)
        record["max_abs_drift"] = self.max_abs_drift
        record["mask"]["kept_fraction"] = self.mask.kept_fraction
        if math.isinf(self.mask.threshold):
            record["mask"]["threshold"] = "inf"
        return record

    def summary(self) -> str:
        """A short table for people."""
        mask = self.mask
        exact = f"yes, by {mask.empty_by}" if mask.empty_by else "NO" if mask.kept_fraction else "not proven"
        weights = "one set of weights" if self.weights.kind == "only" else f"{self.weights.kind} weights"
        drifts = {name: f"{d.max_abs:.3g} ({d.relative_rms:.2%} RMS)" for name, d in self.drift.items()}
        rows = {
            "source": f"{self.source.path} ({_size(self.source.bytes)}, {weights})",
            "output": f"{self.output.path} ({_size(self.output.bytes)})",
            "mask": f"threshold {mask.threshold:g} {mask.threshold_unit}, factor {mask.aux_scale:g}",
            "mask empty": f"{exact}; largest kept fraction {mask.kept_fraction:.3g}",
            "probe images": f"{len(self.probes.images)} {self.probes.kind}",
            **{f"drift {name}": text for name, text in drifts.items()},
        }
        if self.macs is not None:
            height, width = self.macs.shape
            before, after = self.macs.before / 1e9, self.macs.after / 1e9
            cost = f"{before:.3f} G with the softmax branch, {after:.3f} G without"
            rows[f"MACs at {height} x {width}"] = cost
        if self.fusion is not None:
            fusion = self.fusion
            height, width = fusion.shape
            rows["fused"] = ", ".join(f"{count} {kind}" for kind, count in fusion.folded.items())
            rows["fused drift"] = f"{fusion.max_abs_drift:.3g}, by rounding"
            rows[f"ms at {height} x {width}"] = f"{fusion.before_ms:.2f} before, {fusion.after_ms:.2f} fused"
        return table(rows, self.notes)


def table(rows: dict[str, str], notes: tuple[str, ...]) -> str:
    """Names and texts in two columns, notes below."""
    column = max(map(len, rows))
    lines = [f"{name:<{column}}  {text}" for name, text in rows.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
