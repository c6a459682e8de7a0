"""`MaskAnnealingHook` in a real mmengine Runner: what it sets, logs, records; resuming; refusals."""

from __future__ import annotations

import contextlib
import json
import math
from itertools import pairwise

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner

from castling_det.engine import MaskAnnealingHook, mask_state
from castling_det.models import CastlingViT

ITERATIONS = 20


class TinyModel(BaseModel):
    def __init__(self, attention="castling", threshold_unit="absolute"):
        super().__init__()
        self.backbone = CastlingViT(
            16,
            depth=2,
            num_heads=2,
            img_size=32,
            attention=attention,
            attn_cfg=dict(threshold_unit=threshold_unit, threshold=0.26),
        )
        self.seen = []

    def forward(self, inputs, mode="tensor"):
        attention = self.backbone.blocks[1].attn
        self.seen.append((attention.mask_state.threshold, attention.mask_state.aux_scale))
        return {"loss": self.backbone(inputs)[0].square().mean()}


def run(work_dir, *, hook=None, model=None, resume=False, stop_after=None, max_iters=ITERATIONS):
    torch.manual_seed(0)
    model = model or TinyModel()

    class Stop(Exception):
        pass

    class StopHook(MaskAnnealingHook.__mro__[1]):
        priority = "LOWEST"

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if stop_after is not None and runner.iter + 1 == stop_after:
                raise Stop

    runner = Runner(
        model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            sampler=dict(type="InfiniteSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
            dataset=[{"inputs": torch.randn(3, 32, 32)}] * 4,
        ),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=max_iters),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=5, by_epoch=False),
            logger=dict(type="LoggerHook", interval=5),
        ),
        custom_hooks=[hook or dict(type="castling_det.MaskAnnealingHook", interval=5), StopHook()],
        resume=resume,
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        default_scope="mmengine",
        experiment_name=f"{work_dir.name}-{resume}-{stop_after}",
    )
    with contextlib.suppress(Stop):
        runner.train()
    return model


def expected(iteration, **options):
    settings = dict(schedule="geometric", start=0.26, end=1.0) | options
    state = mask_state(iteration / ITERATIONS, **settings)
    return state.threshold, state.aux_scale


def test_sets_logs_and_records_the_mask(tmp_path):
    model = run(tmp_path)
    assert model.seen == [expected(i) for i in range(ITERATIONS)]
    assert model.seen[15][0] < math.inf and all(threshold == math.inf for threshold, _ in model.seen[16:])
    (scalars,) = tmp_path.glob("*/vis_data/scalars.json")
    logged = {row["step"]: row for row in map(json.loads, scalars.read_text().splitlines()) if "mask/threshold" in row}
    assert set(logged) == {5, 10, 15, 20}
    assert logged[5]["mask/threshold"] == pytest.approx(expected(4)[0]) and logged[20]["mask/threshold"] == 1.0
    for layer in ("blocks.0", "blocks.1"):
        for quantity in ("kept_fraction", "kept_mass"):
            assert logged[20][f"mask/{quantity}/{layer}"] == 0.0
            assert 0 <= logged[5][f"mask/{quantity}/{layer}"] <= 1
    half, end = (
        torch.load(tmp_path / f"iter_{i}.pth", weights_only=False)["meta"]["castling_det"]["mask"] for i in (10, 20)
    )
    assert half["iteration"] == 10 and half["threshold"] == pytest.approx(expected(9)[0]) and half["empty"] is False
    assert end["empty"] is True and end["threshold"] == math.inf and end["max_iters"] == ITERATIONS
    assert end["layers"]["blocks.1"] == {"kept_fraction": 0.0, "kept_mass": 0.0}


@pytest.mark.parametrize("options", [dict(), dict(fade=True), dict(share=0.9)], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    hook = lambda: dict(type="castling_det.MaskAnnealingHook", schedule="cosine", **options)  # noqa: E731
    whole = run(tmp_path / "whole", hook=hook())
    first = run(tmp_path / "parts", hook=hook(), stop_after=12)
    second = run(tmp_path / "parts", hook=hook(), resume=True)
    assert len(first.seen) == 12 and len(second.seen) == 10  # from the checkpoint of iteration 10
    assert first.seen[:10] + second.seen == whole.seen
    assert (max(scale for _, scale in whole.seen) > 1) == ("share" in options)


@pytest.mark.parametrize(("max_iters", "opens"), [(ITERATIONS, False), (4 * ITERATIONS, True)])
def test_a_mask_that_a_longer_training_opens_again_is_said(tmp_path, max_iters, opens):
    """The threshold has risen far by iteration 15 of 20, and hardly by iteration 15 of 80."""
    run(tmp_path, stop_after=ITERATIONS - 1)
    run(tmp_path, resume=True, max_iters=max_iters, stop_after=ITERATIONS)
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert ("the mask opens again" in log) == opens
    assert (f"max_iters={ITERATIONS}; at this iteration of max_iters={max_iters}" in log) == opens


def test_uniform_unit(tmp_path):
    model = run(
        tmp_path,
        model=TinyModel(threshold_unit="uniform"),
        hook=dict(type="castling_det.MaskAnnealingHook", start=0.5, end=4, schedule="linear"),
    )
    assert model.seen[0] == (0.5, 1.0) and model.seen[8][0] == pytest.approx(0.5 + 0.5 * 3.5)


def test_every_layer_ramps_to_a_probability_of_one_with_its_own_tokens(tmp_path):
    """Nothing says how many tokens an image has."""
    seen = []

    class Watched(TinyModel):
        def forward(self, inputs, mode="tensor"):
            seen.append([block.attn.mask_state for block in self.backbone.blocks])
            return super().forward(inputs, mode)

    model = Watched(threshold_unit="uniform")
    run(tmp_path, model=model, hook=dict(type="castling_det.MaskAnnealingHook", begin=0.2, interval=5))
    for tokens in (4, 1000):
        absolute = [states[1].absolute(tokens) for states in seen]
        assert absolute[:5] == pytest.approx([0.26 / tokens] * 5)
        assert absolute[10] == pytest.approx(math.sqrt(0.26 / tokens))
        assert all(one < other < 1 for one, other in pairwise(absolute[4:16]))
        assert all(state.is_empty(tokens) for states in seen[16:] for state in states)
        assert not any(state.is_empty(tokens) for states in seen[:16] for state in states)
    (scalars,) = tmp_path.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    ramps = [row["mask/ramp"] for row in rows if "mask/aux_scale" in row]
    assert ramps == pytest.approx([0, 5 / 12, 10 / 12, 1]) and not any("mask/threshold" in row for row in rows)
    mask = torch.load(tmp_path / "iter_15.pth", weights_only=False)["meta"]["castling_det"]["mask"]
    assert mask["ramp"] == pytest.approx(10 / 12) and mask["threshold"] == 0.26 and not mask["empty"]
    assert "is not needed any more" not in "".join(path.read_text() for path in tmp_path.rglob("*.log"))


def test_an_older_config_goes_on_working_with_a_notice(tmp_path):
    hook = dict(type="castling_det.MaskAnnealingHook", end=4, interval=5)
    model = run(tmp_path, model=TinyModel(threshold_unit="uniform"), hook=hook)
    assert model.seen == [expected(i, end=4) for i in range(ITERATIONS)]
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert log.count("end=4 is not needed any more") == 1


def test_a_ramp_that_a_longer_training_takes_back_is_said(tmp_path):
    hook = dict(type="castling_det.MaskAnnealingHook")
    for attempt in (dict(stop_after=13), dict(resume=True, max_iters=4 * ITERATIONS, stop_after=14)):
        run(tmp_path, model=TinyModel(threshold_unit="uniform"), hook=hook, **attempt)
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "saved at threshold 0.26 (uniform, 56% of the way to 1) of max_iters=20" in log


@pytest.mark.parametrize(
    ("options", "unit", "attention", "message"),
    [
        (dict(schedule="step"), "absolute", "castling", r"schedule='step': expected one of"),
        (dict(empty_from=1.0), "absolute", "castling", r"empty_from=1.0: the mask would not be empty before training"),
        (dict(begin=0.9), "absolute", "castling", r"begin=0.9: expected 0 <= begin < empty_from"),
        (dict(end=0.5), "absolute", "castling", r"end=0.5: the schedule cannot empty the mask"),
        (dict(schedule="linear"), "uniform", "castling", r"end=None: with threshold_unit='uniform'"),
        (dict(start=0.0), "absolute", "castling", r"start=0.0: expected a positive threshold"),
        (dict(interval=0), "absolute", "castling", r"interval=0"),
        (dict(share=1.0), "absolute", "castling", r"share=1.0, fade=False: expected a share in \(0, 1\)"),
        (dict(share=0.5, fade=True), "absolute", "castling", r"share=0.5, fade=True: expected a share"),
        (dict(empty_from=0.99), "absolute", "castling", r"empty_from=0.99: leaves no iteration of max_iters=20"),
        (dict(), "absolute", "linear", r"found no attention in mode 'castling'.*attention='castling'"),
    ],
)
def test_refusals(tmp_path, options, unit, attention, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model=TinyModel(attention, unit), hook=MaskAnnealingHook(**options))


def test_finds_the_layers_behind_a_wrapper():
    from mmengine.registry import MODEL_WRAPPERS

    from castling_det.layers import attention_layers

    @MODEL_WRAPPERS.register_module(force=True)
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert list(attention_layers(Wrapper(TinyModel()), "castling")) == ["blocks.0", "blocks.1"]
