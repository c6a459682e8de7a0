"""Comparison by RMS and by the largest error: RMS alone hides one destroyed token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


def assert_same_gradients(
    actual: Tensor, expected: Tensor, inputs: Mapping[str, Tensor], *, rms: float, maximum: float, zero: float = 1e-12
) -> None:
    """Compares the gradients of all inputs; one that is exactly zero in theory must be below `zero` in both."""
    weight = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).reshape(actual.shape)
    found, wanted = (torch.autograd.grad((x * weight).sum(), list(inputs.values())) for x in (actual, expected))
    for name, one, other in zip(inputs, found, wanted, strict=True):
        if other.abs().max() < zero:
            assert one.abs().max() < zero, name
        else:
            assert_parity(one, other, rms=rms, maximum=maximum, what=name)
