"""The experiments as chains of public commands: each takes what the one before it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo import demo_steps
from experiments import DATA, Experiment
from study import VARIANTS, recipe, study_steps
from uptrain import uptraining_steps

from tests.experiments import ROOT


@pytest.fixture
def plan(tmp_path):
    return Experiment(tmp_path / "w", "castling_vit/gfl_castling-vit-nano")


def named(steps):
    assert len({step.name for step in steps}) == len({step.done for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def test_the_demo_is_a_chain_of_public_commands(plan):
    steps = named(demo_steps(plan, (0, 3)))
    assert len(steps) == 13
    train, convert, test = (steps[f"seed 3: {name}"] for name in ("train castling", "convert", "test deploy"))
    assert "randomness.seed=3" in train.command and train.command[1].endswith("mmdet/.mim/tools/train.py")
    assert train.resumes and "--resume" in train.command and "castling" in train.settings
    assert set(plan.annotations) <= set(train.inputs)
    assert str(train.folder / "iter_2400.pth") in convert.command and convert.inputs == (train.done,)
    assert str(plan.folder(3, "deploy") / "deploy.pth") in test.command and test.inputs == (convert.done,)
    report = steps["report"]
    assert sum(part == "--run" for part in report.command) == 6
    assert {step.done for name, step in steps.items() if ": test" in name} <= set(report.inputs)


def test_every_data_set_has_a_converter():
    for folder in DATA.values():
        assert (ROOT / "tools" / "dataset_converters" / f"{folder.name}.py").is_file()


def test_a_data_set_elsewhere_is_the_one_that_is_trained_on(plan, tmp_path):
    moved = Experiment(plan.work_dir, plan.model, data_root=tmp_path)
    steps = named(demo_steps(moved, (0,), max_iters=7))
    for step in (steps["seed 0: train softmax"], steps["seed 0: test deploy"]):
        assert f"train_dataloader.dataset.data_root={tmp_path}/" in step.command
        assert f"test_evaluator.ann_file={tmp_path}/annotations/val.json" in step.command
    assert "train_cfg.max_iters=7" in steps["seed 0: train softmax"].command
    assert "iter_7.pth" in " ".join(steps["seed 0: convert"].command)


def test_a_model_without_configs_is_named(plan):
    with pytest.raises(ValueError, match=r"model='none/such', data='tree-crowns': the config .* is missing"):
        demo_steps(Experiment(plan.work_dir, "none/such"), (0,))


def test_the_study_trains_each_variant_and_tests_its_model(plan):
    steps = named(study_steps(plan, ("softmax", "published"), (0, 1), recipe(1600), "softmax"))
    assert len(steps) == 9
    train, test = steps["seed 1: train published"], steps["seed 1: test published"]
    assert "train_cfg.max_iters=1600" in train.command and "custom_hooks.2.schedule=constant" in train.command
    options = [f"{key}={value}" for key, value in VARIANTS["published"][1].items() if key.startswith("model.")]
    assert options and set(options) <= set(train.command) & set(test.command)
    assert "custom_hooks.2.schedule=constant" not in test.command
    assert str(train.folder / "iter_1600.pth") in test.command


@pytest.fixture
def teachers(tmp_path):
    for seed in (0, 2):
        tested = tmp_path / f"seed{seed}" / "test" / "now"
        tested.mkdir(parents=True)
        tmp_path.joinpath(f"seed{seed}", "iter_2400.pth").touch()
        tested.joinpath("now.json").write_text(json.dumps({"coco/bbox_mAP": 0.1}))
    return str(tmp_path / "seed{seed}")


def test_uptraining_starts_from_the_softmax_detector(plan, teachers):
    steps = named(uptraining_steps(plan, teachers, (0, 2), {}))
    assert len(steps) == 9
    start, train, convert, test = (
        steps[f"seed 2: {name}"] for name in ("start from softmax", "train castling", "convert", "test deploy")
    )
    teacher, began = Path(teachers.format(seed=2), "iter_2400.pth"), plan.folder(2, "start") / "start.pth"
    config = str(plan.config("castling-from-softmax"))
    assert start.command[2:6] == ("--from-softmax", config, str(teacher), str(began))
    assert f"load_from={began}" in train.command and "randomness.seed=2" in train.command
    assert "--resume" not in train.command and not train.resumes, "mmengine would resume from load_from"
    assert str(train.folder / "iter_600.pth") in convert.command, "a quarter of 2400"
    assert "deploy-from-softmax" in test.command[2]
    for before, after in ((start, train), (train, convert), (convert, test)):
        assert before.done in after.inputs
    report = steps["report"].command
    runs = [report[i + 1].partition("=")[0] for i, part in enumerate(report) if part == "--run"]
    assert runs == ["softmax", "uptrained"] * 2


def test_distillation_and_options(plan, teachers):
    options = {"optim_wrapper.optimizer.lr": "1e-4", "train_cfg.max_iters": "7"}
    steps = named(uptraining_steps(plan, teachers, (0,), options, distill=True))
    train, convert, test = (steps[f"seed 0: {name}"] for name in ("train castling", "convert", "test deploy"))
    assert "castling-from-softmax-distilled" in train.command[2] == convert.command[2]
    assert f"model.distillation.checkpoint={teachers.format(seed=0)}/iter_2400.pth" in train.command
    assert {"train_cfg.max_iters=7", "optim_wrapper.optimizer.lr=1e-4"} <= set(train.command)
    assert str(train.folder / "iter_7.pth") in convert.command and "distilled" not in test.command[2]


@pytest.mark.parametrize(
    ("missing", "message"), [("iter_2400.pth", r"expected last_checkpoint or one .pth file"), ("test", r"no <time>")]
)
def test_a_teacher_that_is_not_there_is_named(plan, teachers, tmp_path, missing, message):
    (tmp_path / "seed2" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"seed2.*{message}"):
        uptraining_steps(plan, teachers, (0, 2), {})
