"""Whether a variant computes what it should: outputs and gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castling_det.analysis.benchmark.options import Case
from castling_det.analysis.benchmark.reference import reference_of
from castling_det.analysis.benchmark.subject import Subject, tensors_of

__all__ = ["TOLERANCES", "Parity", "Tolerance", "check_parity", "errors", "tolerance_for", "why_no_gradients"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the errors relative to the RMS of the reference: their RMS, and the largest."""

    rms: float
    maximum: float

    def scaled(self, factor: float) -> Tolerance:
        """Both bounds times `factor`."""
        return Tolerance(factor * self.rms, factor * self.maximum)

    def __add__(self, other: Tolerance) -> Tolerance:
        return Tolerance(self.rms + other.rms, self.maximum + other.maximum)


TOLERANCES: Mapping[str, Tolerance] = {
    # A convolution's gradient adds up all tokens in turn: hundreds of roundings (6e-8), far less than any wrong term.
    "float32": Tolerance(1e-4, 1e-3),
    # Four roundings of the result and of what a block keeps on the way (4e-3 and 5e-4 each).
    "bfloat16": Tolerance(1.5e-2, 0.2),
    "float16": Tolerance(2e-3, 0.03),
}
"""For one layer."""

MODEL_FACTOR = 3.0
"""Backbone and detector: the roundings of d layers add up like sqrt(d), 3.5 for twelve."""

MASK_FLIPS = Tolerance(0.5, 8.0)
"""Over N, added where the mask is active: an entry at the threshold 1/N that falls on its other side in the lower
precision moves one output by about 1/N of a value vector, at whatever precision."""

RELU_FLIPS = Tolerance(8.0, 64.0)
"""Times the root of the rounding, added for a detector's gradients: an activation of a head within a rounding of zero
falls on the other side of its ReLU, about that share of them, and takes its whole gradient along."""

QUADRATIC_GRADIENT_TOKENS = 1024
"""Longest sequence at which gradients are compared with those of an N x N reference."""

MODEL_GRADIENT_TOKENS = 4096
"""Longest sequence at which gradients of a backbone or detector are compared: its float64 graph takes 3 GiB there."""


def tolerance_for(case: Case, tokens: int, *, masked: bool) -> Tolerance:
    """The bounds of a variant in a case; `masked` where an active mask decides on entries at its threshold."""
    tolerance = TOLERANCES[case.dtype]
    if masked:
        tolerance += MASK_FLIPS.scaled(1 / tokens)
    if case.level in ("backbone", "detector"):
        tolerance = tolerance.scaled(MODEL_FACTOR)
    if case.level == "detector" and case.passes == "forward+backward":
        tolerance += RELU_FLIPS.scaled(math.sqrt(torch.finfo(case.torch_dtype).eps / 2))
    return tolerance


def why_no_gradients(tokens: int, *, level: str, quadratic: bool) -> str | None:
    """Why gradients are not compared at this length, or None where they are; `quadratic` is the reference's cost."""
    limit: float = QUADRATIC_GRADIENT_TOKENS if quadratic else math.inf
    if level in ("backbone", "detector"):
        limit = min(limit, MODEL_GRADIENT_TOKENS)
    return f"N = {tokens} is over {limit}" if tokens > limit else None


@dataclass(frozen=True)
class Parity:
    """The worst errors over everything in `compared`, and what they may be."""

    rms: float
    maximum: float
    tolerance: Tolerance
    compared: str

    @property
    def ok(self) -> bool:
        """Whether both are within the tolerance; not a number is not."""
        return self.rms <= self.tolerance.rms and self.maximum <= self.tolerance.maximum


def check_parity(subject: Subject, tolerance: Tolerance, *, why_no_gradients: str | None = None) -> Parity:
    """Runs `subject` and its float64 twin, of the same weights, input and output gradients.

    Args:
        subject: as it will be timed.
        tolerance: the bounds.
        why_no_gradients: compares outputs alone, and says why.
    """
    subject.reset()
    actual = list(subject())
    compared = ["output"]
    twin = reference_of(subject.module)
    if subject.backward and why_no_gradients is None:
        observed = subject.observed
        actual += _gradients(subject, observed)
        expected = _expected_with_gradients(twin, subject, observed)
        compared += ["gradient of the input", *([f"gradient of {observed}"] if observed else [])]
    else:
        with torch.no_grad():
            expected = list(tensors_of(twin(subject.x.double())))
        compared += [f"no gradients: {why_no_gradients}"] if subject.backward else []
    subject.reset()
    worst = [errors(*pair) for pair in zip(actual, expected, strict=True)]
    rms, maximum = (max(column, key=_nan_last) for column in zip(*worst, strict=True))
    return Parity(rms, maximum, tolerance, ", ".join(compared))


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS and max-abs of the difference, both relative to the RMS of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = actual.detach().double() - expected.detach()
    scale = expected.detach().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float(difference.square().mean().sqrt() / scale), float(difference.abs().max() / scale)


def _expected_with_gradients(twin: nn.Module, subject: Subject, observed: str | None) -> list[Tensor]:
    assert subject.cotangents is not None
    cotangents = tuple(cotangent.double() for cotangent in subject.cotangents)
    reference = Subject(twin, subject.x.double(), backward=True, cotangents=cotangents)
    outputs = list(reference())
    return outputs + _gradients(reference, observed)


def _gradients(subject: Subject, observed: str | None) -> list[Tensor]:
    of_parameter = subject.module.get_parameter(observed).grad if observed else None
    found = [subject.x.grad, of_parameter] if observed else [subject.x.grad]
    assert all(gradient is not None for gradient in found), f"no gradient of the input or of {observed}"
    return [gradient for gradient in found if gradient is not None]


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
