"""What only `CastlingViT` has: position embedding, prefix tokens, ViTDet's windows."""

from __future__ import annotations

import itertools

import pytest
import torch

from castling_det.layers import CastlingAttention, CastlingBlock
from castling_det.models import CastlingViT
from castling_det.report.complexity import count_macs
from tests.compare import errors
from tests.models.backbones import image, randomised, small

SIDE = 3


def test_position_embedding_is_interpolated_to_the_grid():
    backbone = small("vit", "linear", depth=1, out_indices=(0,))
    with torch.no_grad():
        backbone.pos_embed.copy_(torch.linspace(0, 1, 4)[None, :, None].repeat(1, 4, 32))
    wide = backbone._position_embedding((4, 8)).reshape(4, 8, 32)
    # Columns go from 0 to 1 on any grid, rows are constant: a transposed grid would show.
    assert (wide[:, 1:, 0] > wide[:, :-1, 0]).all()
    torch.testing.assert_close(wide[0], wide[3], rtol=0, atol=1e-5)
    assert backbone._position_embedding((4, 4)) is backbone.pos_embed


@pytest.mark.parametrize("token", ["cls_token", "reg_token"])
def test_prefix_tokens_join_the_attention_and_are_dropped(token):
    backbone = randomised(small("vit-conv", "linear")).eval()
    before = backbone(image(64, 64))[0]
    assert before.shape == (2, 32, 8, 8)
    with torch.no_grad():
        getattr(backbone, token).copy_(getattr(backbone, token).flip(-1))
    assert errors(backbone(image(64, 64))[0], before)[0] > 1e-5


@pytest.mark.parametrize("hw", [(6, 9), (5, 7), (2, 2)], ids=str)
def test_windows_attend_each_by_itself(hw):
    """The map is padded with zeros to whole windows, whose tokens take part."""
    height, width = hw
    block = randomised(CastlingBlock(CastlingAttention(8, 2, mode="softmax"), window_size=SIDE).double())
    x = torch.randn(2, height * width, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = torch.zeros(2, height + -height % SIDE, width + -width % SIDE, 8, dtype=torch.float64)
    padded[:, :height, :width] = block.norm1(x).unflatten(1, hw)
    attended = torch.empty_like(padded)
    for top, left in itertools.product(*(range(0, side, SIDE) for side in padded.shape[1:3])):
        place = (slice(None), slice(top, top + SIDE), slice(left, left + SIDE))
        window = block.attn(padded[place].flatten(1, 2), (SIDE, SIDE))
        attended[place] = window.unflatten(1, (SIDE, SIDE))
    expected = x + attended[:, :height, :width].flatten(1, 2)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, hw), expected, rtol=0, atol=1e-12)
    block.window_size = 0
    assert (block(x, hw) - expected).abs().max() > 1e-3


def test_the_global_blocks_are_the_named_ones():
    options = dict(depth=6, patch_size=8, out_indices=(-1,))
    backbone = small("vit", "softmax", window_size=2, global_indices=(2, 5), **options)
    assert [block.window_size for block in backbone.blocks] == [2, 2, 0, 2, 2, 0]
    # The same parameters as without windows: one checkpoint serves both.
    assert small("vit", "softmax", **options).state_dict().keys() == backbone.state_dict().keys()
    backbone(image(40, 24))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_windows_are_counted_as_padded():
    """A map of 5 x 7 tokens has 2 x 3 windows of 9 tokens each: 6 * 9 * 9 * C for q k^T, and as many for p v."""
    block = CastlingBlock(CastlingAttention(8, 2, mode="softmax"), window_size=SIDE)
    found = count_macs(block, torch.randn(1, 35, 8), (5, 7))
    assert found.macs_by_kind["attention"] == 2 * 6 * 9 * 9 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="castling"), r"window_size=14.*set window_size=0"),
        (dict(attention="softmax", with_cls_token=True), r"window_size=14.*class token"),
        (dict(attention="softmax", global_indices=(2, 12)), r"global_indices=\(2, 12\).*\[0, 12\)"),
    ],
)
def test_unusable_windows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CastlingViT(16, num_heads=2, window_size=14, **options)
