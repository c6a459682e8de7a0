"""The uptraining as a chain of public commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castling_det.experiments import Uptraining, uptraining_steps


@pytest.fixture
def plan(tmp_path):
    def make(**options):
        for seed in (0, 2):
            tested = tmp_path / f"seed{seed}" / "test" / "now"
            tested.mkdir(parents=True, exist_ok=True)
            tmp_path.joinpath(f"seed{seed}", "iter_2400.pth").touch()
            tested.joinpath("now.json").write_text(json.dumps({"coco/bbox_mAP": 0.1}))
        return Uptraining(
            work_dir=tmp_path / "w",
            configs=Path("configs/castling_vit"),
            tools=Path("tools"),
            prefix="gfl_castling-vit-nano",
            suffix="tree-crowns",
            teachers=str(tmp_path / "seed{seed}"),
            annotations=tmp_path / "val.json",
            images=tmp_path,
            seeds=(0, 2),
            **options,
        )

    return make


def test_each_step_takes_what_the_one_before_wrote(plan, tmp_path):
    steps = uptraining_steps(plan())
    assert len({step.name for step in steps}) == len({step.stamp for step in steps}) == len(steps) == 9
    start, train, convert, test = steps[4:8]
    folder = tmp_path / "w" / "seed2"
    assert start.command[2:5] == (
        "--from-softmax",
        "configs/castling_vit/gfl_castling-vit-nano_castling-from-softmax_tree-crowns.py",
        str(tmp_path / "seed2" / "iter_2400.pth"),
    )
    assert start.command[5] == str(folder / "start" / "start.pth")
    assert f"load_from={folder / 'start' / 'start.pth'}" in train.command and "randomness.seed=2" in train.command
    assert "--resume" not in train.command, "mmengine would resume from load_from"
    assert str(folder / "castling" / "iter_600.pth") in convert.command, "a quarter of 2400"
    assert "deploy-from-softmax" in test.command[2] and test.command[3] == str(folder / "deploy" / "deploy.pth")
    for before, after in ((start, train), (train, convert), (convert, test)):
        assert before.stamp in after.inputs
    report = steps[-1].command
    runs = [report[i + 1].partition("=")[0] for i, part in enumerate(report) if part == "--run"]
    assert runs == ["softmax", "uptrained"] * 2


def test_distillation_and_options(plan, tmp_path):
    steps = uptraining_steps(plan(distill=True, max_iters=7, options=["optim_wrapper.optimizer.lr=1e-4"]))
    _, train, convert, test = steps[:4]
    assert "castling-from-softmax-distilled" in train.command[2] == convert.command[2]
    assert f"model.distillation.checkpoint={tmp_path / 'seed0' / 'iter_2400.pth'}" in train.command
    assert {"train_cfg.max_iters=7", "optim_wrapper.optimizer.lr=1e-4"} <= set(train.command)
    assert str(tmp_path / "w" / "seed0" / "castling" / "iter_7.pth") in convert.command
    assert "distilled" not in test.command[2]


@pytest.mark.parametrize(
    ("missing", "message"), [("iter_2400.pth", r"expected last_checkpoint or one .pth file"), ("test", r"no <time>")]
)
def test_a_teacher_that_is_not_there_is_named(plan, tmp_path, missing, message):
    made = plan()
    path = tmp_path / "seed2" / missing
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"seed2.*{message}"):
        uptraining_steps(made)
