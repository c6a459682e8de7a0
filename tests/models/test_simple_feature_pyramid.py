"""`SimpleFeaturePyramid`: strides from maps of any stride, gradients, errors."""

from __future__ import annotations

import pytest
import torch

from castling_det.models import SimpleFeaturePyramid


@pytest.mark.parametrize(
    ("in_stride", "out_strides"),
    [(16, (4, 8, 16, 32)), (16, (4, 8, 16, 32, 64)), (8, (8, 16, 32)), (8, (4, 8, 16, 32, 64))],
)
def test_strides_and_channels(in_stride, out_strides):
    neck = SimpleFeaturePyramid(32, out_channels=12, in_stride=in_stride, out_strides=out_strides)
    size = (128, 192)
    maps = neck((torch.zeros(1), torch.randn(2, 32, size[0] // in_stride, size[1] // in_stride)))
    assert [tuple(m.shape) for m in maps] == [(2, 12, size[0] // s, size[1] // s) for s in out_strides]
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in neck.parameters())


def test_vitdet_parameter_count():
    """ViTDet, width C, out D: two, one and no transposed convolutions, then 1x1 and 3x3, each with LayerNorm."""
    c, d = 32, 12
    up4 = c * c // 2 * 4 + c // 2 + 2 * (c // 2) + c // 2 * c // 4 * 4 + c // 4
    up2 = c * c // 2 * 4 + c // 2
    tails = sum(width * d + 9 * d * d + 4 * d for width in (c // 4, c // 2, c, c))
    assert sum(p.numel() for p in SimpleFeaturePyramid(c, out_channels=d).parameters()) == up4 + up2 + tails


@pytest.mark.parametrize("out_strides", [(), (8, 4), (5, 10), (4, 8, 128), (64, 128)])
def test_errors_name_the_field(out_strides):
    with pytest.raises(ValueError, match=r"out_strides="):
        SimpleFeaturePyramid(32, out_strides=out_strides)
