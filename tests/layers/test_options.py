"""`MaskState` and the finder of attention layers."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from torch import nn

from castling_det.layers import CastlingAttention, LevitAttention, MaskState, attention_layers


def test_uniform_unit_means_the_same_at_every_resolution():
    state = MaskState(2.0, "uniform")
    assert state.absolute(100) == 0.02 and state.absolute(1600) == 2 / 1600
    assert state.is_empty(2) and not state.is_empty(3)
    assert MaskState(0.02).absolute(100) == MaskState(0.02).absolute(1600) == 0.02


@pytest.mark.parametrize("tokens", [49, 1600])
def test_a_ramp_is_even_in_the_logarithm_of_the_probability(tokens):
    ways = [MaskState(2.0, "uniform", ramp=ramp).absolute(tokens) for ramp in (0, 0.25, 0.5, 1)]
    assert ways == pytest.approx([2 / tokens, (2 / tokens) ** 0.75, math.sqrt(2 / tokens), 1.0])
    assert MaskState(0.04, ramp=0.5).absolute(tokens) == pytest.approx(0.2)
    assert MaskState(2.0, "uniform", ramp=1.0).is_empty(tokens)
    assert not MaskState(2.0, "uniform", ramp=0.99).is_empty(tokens)


@pytest.mark.parametrize("state", [MaskState(1.0), MaskState(math.inf, "uniform"), MaskState(0.0, aux_scale=0.0)])
def test_an_empty_mask_is_empty_at_every_size(state):
    assert all(state.is_empty(tokens) for tokens in (1, 49, 1600))


def test_meta_holds_the_state_among_other_records():
    state = MaskState(0.3, "uniform", 0.5)
    record = json.loads(json.dumps({"schedule": "cosine", **dataclasses.asdict(state)}))
    assert MaskState.from_meta(record) == state
    assert MaskState.from_meta({**record, "ramp": 0.3}) == dataclasses.replace(state, ramp=0.3)
    del record["ramp"]  # as in checkpoints of before
    assert MaskState.from_meta(record) == state
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.threshold = 0.4


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (dict(threshold=-1.0), "threshold=-1.0: expected a number >= 0 in the unit 'absolute'"),
        (dict(threshold=math.nan), "threshold=nan"),
        (dict(threshold="0.5"), "threshold='0.5'"),
        (dict(threshold_unit="percent"), "threshold_unit='percent': expected one of 'absolute', 'uniform'"),
        (dict(aux_scale=-2), "aux_scale=-2: expected a finite factor >= 0"),
        (dict(aux_scale=math.inf), "aux_scale=inf"),
        (dict(aux_scale=None), "aux_scale=None"),
        (dict(ramp=1.5), r"ramp=1.5: expected a number in \[0, 1\]"),
        (dict(ramp=None), "ramp=None"),
    ],
)
def test_a_record_out_of_range_is_named(record, message):
    good = dict(threshold=0.02, threshold_unit="absolute", aux_scale=1.0)
    with pytest.raises(ValueError, match=message):
        MaskState.from_meta(good | record)
    with pytest.raises(ValueError, match="threshold_unit=None"):
        MaskState.from_meta({"threshold": 0.02})


def test_layers_are_found_by_block_and_mode_behind_wrappers():
    backbone = nn.Module()
    backbone.blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block, mode in zip(backbone.blocks, ("castling", "linear"), strict=True):
        block.attn = CastlingAttention(8, 2, mode=mode)
    backbone.attn_downsample = LevitAttention(8, 8, key_dim=2, num_heads=2)
    detector, wrapper = nn.Module(), nn.Module()
    detector.backbone, wrapper.module = backbone, detector
    detector.head = CastlingAttention(8, 2)
    for model in (backbone, detector, wrapper):
        assert list(attention_layers(model)) == ["blocks.0", "blocks.1", "attn_downsample"]
        assert list(attention_layers(model, "castling")) == ["blocks.0", "attn_downsample"]
        assert attention_layers(model, "linear") == {"blocks.1": backbone.blocks[1].attn}
