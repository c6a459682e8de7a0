"""Gradients of the hybrid branch as its mask empties, also in half precision; the same seed, the same weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from castling_det.engine import mask_state
from castling_det.layers import CastlingAttention
from tests.distributed.ranks import train_in_ranks
from tests.distributed.settings import write_data

STEPS = 60
CASE = dict(attention="castling", with_cp=False)


def gradient_norms(mode, *, normalizer="l2", fade=False, schedule="geometric", lr=0.05, dtype=None):
    """The norm of all gradients of one layer at each step of a training on noise, the mask on its way."""
    torch.manual_seed(0)
    layer = CastlingAttention(32, 4, mode=mode, normalizer=normalizer, threshold=0.3, threshold_unit="uniform")
    with torch.no_grad():  # peaked rows, so that the mask has something to lose at every threshold
        layer.qkv.weight.mul_(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    norms, kept = [], []
    for step in range(STEPS):
        x, target = torch.randn(2, 4, 63, 32).unbind(0)
        layer.mask_state = mask_state(
            step / STEPS, schedule=schedule, start=0.3, end=63.0, threshold_unit="uniform", empty_from=0.7, fade=fade
        )
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = layer(x, (7, 9))
        loss = (out.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in layer.parameters())))
        kept.append(float(layer.mask_stats.kept_fraction) if layer.mask_stats is not None else 0.0)
        optimizer.step()
    return norms, kept


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("fade", [False, True], ids=["cut", "fade"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "geometric"])
def test_gradients_stay_bounded_while_the_mask_empties(normalizer, fade, schedule):
    """Bounded by twice what linear attention alone has: nothing divides by what the mask keeps."""
    norms, kept = gradient_norms("castling", normalizer=normalizer, fade=fade, schedule=schedule)
    alone, _ = gradient_norms("linear", normalizer=normalizer)
    assert kept[0] > 0.2 and kept[-1] == 0.0, "the mask goes from open to empty"
    assert all(map(math.isfinite, norms))
    assert max(norms) < 2 * max(alone)
    steps = [abs(after - before) for before, after in itertools.pairwise(norms)]
    assert max(steps) < max(alone), "no jump where the branch ends"


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_as_float32_does(dtype, normalizer):
    half, kept = gradient_norms("castling", normalizer=normalizer, dtype=dtype)
    full, _ = gradient_norms("castling", normalizer=normalizer)
    assert kept[0] > 0.2 and kept[-1] == 0.0 and half != full
    torch.testing.assert_close(torch.tensor(half), torch.tensor(full), rtol=0.05, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stability"))


def test_the_same_seed_trains_the_same_weights_in_another_process(folder):
    """Two processes of their own, castling from an open to an empty mask; another seed trains others."""
    runs = [train_in_ranks(folder, [{**CASE, "seed": seed}], ranks=1)[0][0] for seed in (1, 1, 2)]
    first, again, other = (run.weights for run in runs)
    assert runs[0].losses == runs[1].losses
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())
