"""What the record of a comparison is made of: series, masks, latencies, differences, counts by image."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Comparison",
    "Counts",
    "Difference",
    "ImageComparison",
    "Latency",
    "Machine",
    "MaskOccupancy",
    "Series",
    "Speed",
    "SpeedPoint",
]


@dataclass(frozen=True)
class Series:
    """A quantity over training: `values[i]` at iteration `steps[i]`, None where it was not finite."""

    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values) or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"steps: expected {len(self.values)} ascending iterations, one a value, got {self.steps[:9]}"
            )


@dataclass(frozen=True)
class MaskOccupancy:
    """What the mask of the softmax branch kept in each layer, over training.

    `kept_fraction` and `kept_mass` are in [0, 1], by layer (`blocks.0`); `threshold` is in the config's unit.
    """

    kept_fraction: dict[str, Series] = field(default_factory=dict)
    kept_mass: dict[str, Series] = field(default_factory=dict)
    threshold: Series = Series()

    @property
    def empty_from(self) -> int | None:
        """First logged iteration from which on no layer kept anything; None if there is none."""
        kept: dict[int, float] = {}
        for series in self.kept_fraction.values():
            for step, value in zip(series.steps, series.values, strict=True):
                # A value that is not finite is no proof of an empty mask.
                kept[step] = max(kept.get(step, 0.0), 1.0 if value is None else value)
        first = None
        for step in sorted(kept, reverse=True):
            if kept[step] > 0:
                break
            first = step
        return first


@dataclass(frozen=True)
class Latency:
    """A measured latency: median in milliseconds of one image at `input_shape` (height, width) in pixels.

    `threads` are torch's on the CPU. `peak_mib` is memory in MiB beyond what stood before the call, None if it was not
    measured. `source` names the record that it was read from.
    """

    p50_ms: float
    threads: int
    device: str
    input_shape: tuple[int, int]
    peak_mib: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Machine:
    """Where a report was made. `device` is the accelerator's name or `cpu`; `commit` that of the checkout, if any."""

    torch: str
    device: str
    cpu: str
    threads: int
    python: str
    commit: str | None


@dataclass(frozen=True)
class SpeedPoint:
    """One variant of attention at one input, `height` x `width` as the level has it; percentiles in milliseconds."""

    variant: str
    height: int
    width: int
    tokens: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mib: float


@dataclass(frozen=True)
class Speed:
    """Latency over input size, from a record of tools/benchmark.py: what was measured to the end with green parity.

    `level` is core, block, backbone or detector; sizes are of the token map (core, block) or of the image in pixels.
    `crossover_tokens` is the number of tokens from which on softmax is slower than linear attention, None where
    `crossover_note` says why there is none.
    """

    source: str
    created_by: str
    level: str
    passes: str
    dtype: str
    batch: int
    machine: Machine
    points: tuple[SpeedPoint, ...]
    crossover_tokens: float | None
    crossover_note: str


@dataclass(frozen=True)
class Difference:
    """mAP of the runs `name` minus the baseline's: the mean over `pairs` of runs, one a seed, and its interval.

    `low` to `high` is the central interval at `confidence` over `resamples` draws of the `images` test images with
    replacement, the same draws for both detectors, from the seed `bootstrap_seed`. It says how much of the difference
    hangs on these images, not how much on the seeds of training.
    """

    name: str
    value: float
    low: float
    high: float
    confidence: float
    pairs: int
    images: int
    resamples: int
    bootstrap_seed: int


@dataclass(frozen=True)
class Counts:
    """Detections of an image that are right (tp) and wrong (fp), and objects that were missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def f1(self) -> float:
        """2 tp / (2 tp + fp + fn), in [0, 1]; 1 where there was nothing to find and nothing was found."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0


@dataclass(frozen=True)
class ImageComparison:
    """The counts of two detectors on one image of the annotation file."""

    image_id: int
    file_name: str
    baseline: Counts
    deployed: Counts

    @property
    def f1_difference(self) -> float:
        """Deployed minus baseline, in [-1, 1]."""
        return self.deployed.f1 - self.baseline.f1


@dataclass(frozen=True)
class Comparison:
    """Two detectors image by image, largest differences first. Boxes count from `score_threshold`, right at `iou`."""

    baseline: str
    deployed: str
    seed: int | None
    score_threshold: float
    iou: float
    images: tuple[ImageComparison, ...]
