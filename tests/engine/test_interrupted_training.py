"""Killed at any point of a save, a step or a validation, a training resumes and ends as if nobody had disturbed it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from castling_det.conversion import load_checkpoint
from castling_det.report.work_dirs import read_training_log
from tests.engine.training import EXACT, ITERATIONS, WHOLE, Dies, checkpoint_hook, result, run

OURS = {"exact_resume": EXACT, **checkpoint_hook(WHOLE)}
THEIRS = checkpoint_hook(dict(type="CheckpointHook"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("undisturbed")
    assert run(work_dir, OURS) == 0
    return work_dir


def checkpoints(work_dir: Path) -> set[str]:
    return {path.name for path in work_dir.glob("*.pth")}


# What is being done when the process is killed, at which iteration, and the checkpoints that are there after it.
KILLS = {
    "half written": (Dies("write", 4), {"iter_2.pth"}),
    "written, not renamed": (Dies("rename", 4), {"iter_2.pth"}),
    "renamed, not pointed at": (Dies("pointer", 4), {"iter_2.pth", "iter_4.pth"}),
    "the old one not yet removed": (Dies("remove", 4), {"iter_2.pth", "iter_4.pth"}),
    "the first one half written": (Dies("write", 2), set()),
    "the last one half written": (Dies("write", 8), {"iter_6.pth"}),
    "in a step": (Dies("step", 5), {"iter_4.pth"}),
    "in the validation": (Dies("validation", 4), {"iter_4.pth"}),
    "in the last validation": (Dies("validation", 8), {"iter_8.pth"}),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_training_resumes_to_the_same_bits(undisturbed: Path, tmp_path: Path, moment: str) -> None:
    dies, left = KILLS[moment]
    code = run(tmp_path, OURS, dies)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ)
    assert checkpoints(tmp_path) == left
    for name in left:
        load_checkpoint(tmp_path / name)
    if left:
        assert (tmp_path / "last_checkpoint").read_text().endswith(tuple(left))

    assert run(tmp_path, OURS) == 0
    torch.testing.assert_close(result(tmp_path), result(undisturbed), rtol=0, atol=0)
    assert f"iter_{ITERATIONS}.pth" in checkpoints(tmp_path) and not list(tmp_path.glob(".*.part"))
    found, expected = read_training_log(tmp_path), read_training_log(undisturbed)
    assert found.validation["mAP"] == expected.validation["mAP"]
    assert len(expected.validation["mAP"].steps) == 2
    assert found.scalars["loss"] == expected.scalars["loss"]


def test_control_the_hosts_hook_loses_the_run(tmp_path: Path) -> None:
    """The old checkpoint is gone before the new one is there, and what is there under its name is a part."""
    assert run(tmp_path, THEIRS, Dies("write", 4)) == -signal.SIGXFSZ
    assert checkpoints(tmp_path) == {"iter_4.pth"}
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_checkpoint(tmp_path / "iter_4.pth")
    assert run(tmp_path, THEIRS) != 0


def test_control_without_the_hook_a_resumed_run_differs(undisturbed: Path, tmp_path: Path) -> None:
    hooks: dict[str, Any] = checkpoint_hook(WHOLE)
    run(tmp_path, OURS, Dies("step", 5))
    assert run(tmp_path, hooks) == 0
    assert not torch.equal(result(tmp_path)["layers.0.weight"], result(undisturbed)["layers.0.weight"])


@pytest.mark.parametrize("how", ["write", "rename"])
def test_the_best_checkpoint_is_kept_until_the_better_is_whole(tmp_path: Path, how: str) -> None:
    hooks = {"exact_resume": EXACT, **checkpoint_hook(WHOLE, save_best="bbox_mAP", rule="less")}
    # The best one of iteration 8 has that in its meta, and so has the ordinary one, which is saved before it.
    assert run(tmp_path, hooks, Dies(how, 8)) < 0
    assert {"best_bbox_mAP_iter_4.pth", "iter_6.pth"} == checkpoints(tmp_path)
    assert run(tmp_path, hooks) == 0
    assert {"best_bbox_mAP_iter_8.pth", "iter_8.pth"} == checkpoints(tmp_path)
