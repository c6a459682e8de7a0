"""Every attention, and every backbone, centres its keys where it is asked to, and only where that changes something."""

from __future__ import annotations

import pytest
import torch

from castling_det.layers import ATTENTION_MODES, CastlingAttention, LevitAttention, MaskedAttention, PooledAttention
from castling_det.models import CastlingLeViT, CastlingMViT, CastlingViT
from tests.compare import errors

HW = (6, 8)
LAYERS = {
    "vit": lambda **options: CastlingAttention(16, 2, **options),
    "levit": lambda **options: LevitAttention(16, 16, key_dim=8, num_heads=2, **options),
    "levit, subsampled": lambda **options: LevitAttention(16, 24, key_dim=8, num_heads=2, query_stride=2, **options),
    "mvit": lambda **options: PooledAttention(16, 2, stride_kv=2, **options),
}
BACKBONES = {
    "vit": lambda **options: CastlingViT(16, depth=1, num_heads=2, **options),
    "levit": lambda **options: CastlingLeViT("128S", **options),
    "mvit": lambda **options: CastlingMViT("tiny", **options),
}


def pair(name, mode):
    """The same layer without and with centred keys, weights drawn anew, the BatchNorms in eval mode."""
    layers = [LAYERS[name](mode=mode, center_keys=center).double().eval() for center in (False, True)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def output(layer, x):
    out = layer(x, HW)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_keys_lose_their_mean_where_a_cosine_sees_it(name, mode):
    plain, centred = pair(name, mode)
    x = torch.randn(2, HW[0] * HW[1], 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    before, after = (layer.head_inputs(x, HW).k for layer in (plain, centred))
    far, _ = errors(output(centred, x), output(plain, x))
    if mode == "softmax":
        assert torch.equal(after, before) and far == 0
        return
    torch.testing.assert_close(after, before - before.mean(dim=2, keepdim=True), rtol=1e-12, atol=1e-12)
    assert far > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_hand_it_on(name):
    for center in (False, True):
        layers = [m for m in BACKBONES[name](center_keys=center).modules() if isinstance(m, MaskedAttention)]
        assert layers and all(layer.options.center_keys is center for layer in layers)
