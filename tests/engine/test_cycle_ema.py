"""`CycleEMAHook` in a real mmengine Runner: the average, its restarts, resuming; a setting without effect; refusals."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from castling_det.engine import CycleEMAHook

EPOCHS, ITERATIONS = 6, 5
HOOK = dict(type="castling_det.CycleEMAHook", cycle_epochs=2, momentum=0.4, gamma=2, priority=49)


class TinyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs, mode="tensor"):
        return {"loss": (self.norm(self.fc(inputs)) - inputs[:, :2]).square().mean()}


class Recorder(Hook):
    """Notes the weights after every iteration, and the averaged ones after every epoch."""

    priority = "LOWEST"

    def __init__(self):
        self.iterates, self.averages = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.iterates.append(state_of(runner.model))

    def after_train_epoch(self, runner, metrics=None):
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, CycleEMAHook)]
        self.averages.append(state_of(hook.ema_model.module))


def state_of(model):
    """Parameters and statistics of BatchNorm, in float64, without the count of batches."""
    state = {name: value.double().clone() for name, value in model.state_dict().items()}
    state.pop("norm.num_batches_tracked")
    return state


def run(work_dir, *, hook=None, load_from=None, epochs=EPOCHS):
    torch.manual_seed(0)
    recorder = Recorder()
    runner = Runner(
        TinyModel(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
            dataset=[{"inputs": torch.randn(3)} for _ in range(4 * ITERATIONS)],
        ),
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=epochs),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        custom_hooks=[hook or HOOK, recorder],
        load_from=load_from,
        resume=load_from is not None,
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        default_scope="mmengine",
        experiment_name=f"{work_dir.name}-{load_from is not None}-{epochs}",
    )
    runner.train()
    return recorder


def averages_of(iterates, *, cycle_epochs=2, momentum=0.4, gamma=2):
    """After every epoch; begun anew from the weights every `cycle_epochs`."""
    averages, average = [], {}
    for iteration, weights in enumerate(iterates):
        steps = iteration % (cycle_epochs * ITERATIONS)
        share = max(momentum, gamma / (gamma + steps)) if steps else 1.0
        average = {name: average.get(name, 0) * (1 - share) + share * value for name, value in weights.items()}
        if (iteration + 1) % ITERATIONS == 0:
            averages.append(average)
    return averages


def test_the_average_restarts_every_cycle(tmp_path):
    recorder = run(tmp_path)
    expected = averages_of(recorder.iterates)
    assert len(recorder.averages) == len(expected) == EPOCHS
    for found, wanted in zip(recorder.averages, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    without_restart = averages_of(recorder.iterates, cycle_epochs=EPOCHS)
    assert not torch.allclose(recorder.averages[2]["fc.weight"], without_restart[2]["fc.weight"], rtol=1e-3)
    # What a checkpoint holds for testing is the average.
    saved = torch.load(tmp_path / f"epoch_{EPOCHS}.pth", weights_only=False)["state_dict"]
    torch.testing.assert_close(saved["fc.weight"].double(), recorder.averages[-1]["fc.weight"])


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_resumed_run_goes_on(tmp_path, epoch):
    """From a checkpoint at a restart, and in the middle of a cycle."""
    whole = run(tmp_path)
    resumed = run(tmp_path, load_from=str(tmp_path / f"epoch_{epoch}.pth"))
    assert len(resumed.averages) == EPOCHS - epoch
    for found, wanted in zip(resumed.averages, whole.averages[epoch:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_defaults_follow_the_published_average():
    """From zeros, decay min(0.9998, (1 + t) / (10 + t)), bias divided out: the same but for the first iterations."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(3000, generator=generator) * 0.1 + torch.linspace(0, 1, 3000)).double()
    ours = published = 0.0
    rest = 1.0
    for t, value in enumerate(values.tolist()):
        share = max(0.0002, 9 / (9 + t)) if t else 1.0
        ours = ours * (1 - share) + share * value
        decay = min(0.9998, (1 + t) / (10 + t))
        published, rest = decay * published + (1 - decay) * value, rest * decay
    assert ours == pytest.approx(published / (1 - rest), abs=1e-3)
    hook = CycleEMAHook()
    assert hook.cycle_epochs == 40 and hook.ema_cfg == dict(
        type="MomentumAnnealingEMA", momentum=0.0002, gamma=9, update_buffers=True
    )


def test_a_run_without_a_restart_says_so(tmp_path, capsys):
    run(tmp_path, epochs=2)
    assert "cycle_epochs=2 but the run has max_epochs=2: the average is never restarted" in capsys.readouterr().out
    run(tmp_path / "longer", epochs=3)
    assert "never restarted" not in capsys.readouterr().out


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r"cycle_epochs=0: expected at least 1 epoch"):
        CycleEMAHook(cycle_epochs=0)
    with pytest.raises(TypeError, match="ema_type"):
        CycleEMAHook(ema_type="StochasticWeightAverage")
