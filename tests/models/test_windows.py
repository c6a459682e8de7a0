"""ViTDet's windows, the second softmax baseline: equal to attention in each window by itself; refused elsewhere."""

from __future__ import annotations

import pytest
import torch

from castling_det.layers import CastlingAttention, CastlingBlock
from castling_det.models import CastlingViT
from castling_det.report.complexity import count_macs

SIDE = 3


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return module.double()


@pytest.mark.parametrize("hw", [(6, 9), (5, 7), (2, 2)], ids=str)
def test_windows_attend_each_by_itself(hw):
    """The map is padded with zeros to whole windows, whose tokens take part."""
    height, width = hw
    block = randomised(CastlingBlock(CastlingAttention(8, 2, mode="softmax"), window_size=SIDE))
    x = torch.randn(2, height * width, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = torch.zeros(2, height + -height % SIDE, width + -width % SIDE, 8, dtype=torch.float64)
    padded[:, :height, :width] = block.norm1(x).unflatten(1, hw)
    attended = torch.empty_like(padded)
    for top in range(0, padded.shape[1], SIDE):
        for left in range(0, padded.shape[2], SIDE):
            place = (slice(None), slice(top, top + SIDE), slice(left, left + SIDE))
            window = block.attn(padded[place].flatten(1, 2), (SIDE, SIDE))
            attended[place] = window.unflatten(1, (SIDE, SIDE))
    expected = x + attended[:, :height, :width].flatten(1, 2)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, hw), expected, rtol=0, atol=1e-12)
    block.window_size = 0
    assert (block(x, hw) - expected).abs().max() > 1e-3


def test_the_global_blocks_are_the_named_ones():
    backbone = CastlingViT(
        16, depth=6, num_heads=2, attention="softmax", patch_size=8, img_size=32, window_size=2, global_indices=(2, 5)
    )
    assert [block.window_size for block in backbone.blocks] == [2, 2, 0, 2, 2, 0]
    # The same parameters as without windows: one checkpoint serves both.
    plain = CastlingViT(16, depth=6, num_heads=2, attention="softmax", patch_size=8, img_size=32)
    assert plain.state_dict().keys() == backbone.state_dict().keys()
    backbone(torch.randn(1, 3, 40, 24))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_windows_are_counted_as_padded():
    """A map of 5 x 7 tokens has 2 x 3 windows of 9 tokens each: 6 * 9 * 9 * C for q k^T, and as many for p v."""
    block = CastlingBlock(CastlingAttention(8, 2, mode="softmax"), window_size=SIDE)
    found = count_macs(block, torch.randn(1, 35, 8), (5, 7))
    assert found.macs_by_kind["attention"] == 2 * 6 * 9 * 9 * 8


@pytest.mark.parametrize("attention", ["linear", "castling"])
def test_linear_attention_takes_no_windows(attention):
    with pytest.raises(ValueError, match=r"window_size=14.*set window_size=0"):
        CastlingViT(attention=attention, window_size=14)


def test_unusable_windows_are_refused():
    with pytest.raises(ValueError, match=r"window_size=14.*class token"):
        CastlingViT(16, num_heads=2, attention="softmax", window_size=14, with_cls_token=True)
    with pytest.raises(ValueError, match=r"global_indices=\(2, 12\).*\[0, 12\)"):
        CastlingViT(16, num_heads=2, attention="softmax", window_size=14, global_indices=(2, 12))
