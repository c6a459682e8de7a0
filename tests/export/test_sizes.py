"""Strided convolutions with an output size that divides: the same numbers, and no floor in the traced size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from castling_det.export.network import keep_sizes_simple

GEOMETRIES = [(7, 4, 3), (3, 2, 1), (3, 4, 1), (3, 8, 1), (5, 2, 2), (2, 2, 0), ((3, 5), (2, 4), (1, 2))]


@pytest.mark.parametrize("kernel, stride, padding", GEOMETRIES)
@pytest.mark.parametrize("unit", [8, 12])
def test_an_exported_convolution_gives_the_same_at_any_multiple(kernel, stride, padding, unit):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding))
    simple = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding))
    simple.load_state_dict(plain.state_dict())
    keep_sizes_simple(simple)
    rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
    program = torch.export.export(
        simple, (torch.randn(2, 3, 2 * unit, 3 * unit),), dynamic_shapes=({2: unit * rows, 3: unit * columns},),
        strict=False,
    )  # fmt: skip
    for size in [(2 * unit, 3 * unit), (5 * unit, 4 * unit)]:
        x = torch.randn(2, 3, *size)
        for function in (simple, program.module()):
            torch.testing.assert_close(function(x), plain(x))
    if unit == 8:
        (shape,) = [node.meta["val"].shape for node in program.graph.nodes if "conv2d" in node.name]
        assert "//" not in str(shape[2]) and "//" not in str(shape[3]), shape


def test_a_side_that_the_stride_does_not_divide_keeps_its_rounding():
    plain = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1))
    expected = plain(torch.ones(1, 1, 7, 9))
    keep_sizes_simple(plain)
    torch.testing.assert_close(plain(torch.ones(1, 1, 7, 9)), expected, rtol=0, atol=0)


def test_only_plain_strided_convolutions_are_taken():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        Own(1, 1, 3, 2), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, 2, dilation=2), nn.Conv2d(1, 1, 3, 2, padding="valid")
    )
    before = [type(layer) for layer in model]
    keep_sizes_simple(model)
    assert [type(layer) for layer in model] == before
