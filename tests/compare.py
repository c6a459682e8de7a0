"""Comparison by RMS and by the largest error: RMS alone hides one destroyed token."""

from __future__ import annotations

from torch import Tensor


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS and max-abs of the difference, both relative to the RMS of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    difference = actual.detach().double() - expected.detach().double()
    scale = expected.detach().double().square().mean().sqrt().clamp_min(1e-300)
    return float(difference.square().mean().sqrt() / scale), float(difference.abs().max() / scale)


def assert_parity(actual: Tensor, expected: Tensor, *, rms: float, maximum: float, what: str = "") -> None:
    """Fails when either relative error is over its bound, or not a number."""
    found_rms, found_max = errors(actual, expected)
    within = found_rms <= rms and found_max <= maximum
    assert within, f"{what}: rms {found_rms:.2e} (allowed {rms}), max {found_max:.2e} (allowed {maximum})"
