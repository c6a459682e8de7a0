"""Gradients of the hybrid branch as its mask empties; the same seed, the same weights; half precision on a CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from castling_det.engine import Fp16OptimWrapper, mask_state
from castling_det.layers import CastlingAttention
from tests.distributed.ranks import train, train_in_ranks
from tests.distributed.settings import write_data

STEPS = 60
CASE = dict(attention="castling", with_cp=False)


def gradient_norms(mode, *, normalizer="l2", fade=False, schedule="geometric", lr=0.05):
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
        loss = (layer(x, (7, 9)) - target).square().mean()
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


def test_bfloat16_trains_on_a_cpu(folder):
    wrapper = {"optim_wrapper.type": "castling_det.Bf16OptimWrapper"}
    half = train(folder, ranks=1, **CASE, extra=wrapper)
    full = train(folder, ranks=1, **CASE)
    assert all(weight.dtype == torch.float32 for name, weight in half.weights.items() if weight.is_floating_point())
    assert all(map(math.isfinite, half.losses)) and half.losses != full.losses
    torch.testing.assert_close(torch.tensor(half.losses), torch.tensor(full.losses), rtol=0.02, atol=0)
    assert half.kept_by_rank[0][0] > 0 and half.kept_by_rank[-1][0] == 0


def test_float16_trains_on_a_cpu(folder):
    wrapper = {"optim_wrapper.type": "castling_det.Fp16OptimWrapper", "optim_wrapper.loss_scale": 2.0**10}
    half = train(folder, ranks=1, **CASE, extra=wrapper)
    full = train(folder, ranks=1, **CASE)
    assert all(weight.dtype == torch.float32 for name, weight in half.weights.items() if weight.is_floating_point())
    assert all(map(math.isfinite, half.losses)) and half.losses != full.losses
    torch.testing.assert_close(torch.tensor(half.losses), torch.tensor(full.losses), rtol=0.02, atol=0)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    layer = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wrapper = Fp16OptimWrapper(optimizer=optimizer, loss_scale=2.0**16, clip_grad={"max_norm": 1.0})
    before = layer.weight.detach().clone()
    wrapper.update_params(layer(torch.full((1, 4), 3e38)).sum())
    assert torch.equal(layer.weight, before) and wrapper.loss_scaler.get_scale() == 2.0**15
    wrapper.update_params(layer(torch.ones(1, 4)).sum())
    assert not torch.equal(layer.weight, before) and wrapper.loss_scaler.get_scale() == 2.0**15

    again = Fp16OptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))
    again.load_state_dict(wrapper.state_dict())
    assert again.loss_scaler.get_scale() == 2.0**15
    with pytest.raises(ValueError, match=r"loss_scale=0, growth_interval=2000: expected positive"):
        Fp16OptimWrapper(optimizer=optimizer, loss_scale=0)
