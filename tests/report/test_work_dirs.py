"""Reading what mmengine and MMDetection's tools leave: files of a real tiny run, and hand-made ones like them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from castling_det.config import attention_of, checkpoint_of, network_shape, seed_of
from castling_det.report.work_dirs import (
    coco_metrics,
    find_checkpoint,
    read_commands,
    read_dumped_config,
    read_test_metrics,
    read_training_log,
    source_of,
)
from tests.report.samples import write_checkpoint, write_session, write_test


class _Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, *inputs: Tensor, mode: str = "tensor") -> Any:
        out = self.linear(torch.stack(inputs))
        return {"loss": out.square().mean()} if mode == "loss" else [out]


class _Metric(BaseMetric):
    default_prefix = "coco"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"bbox_mAP": 0.123, "bbox_mAP_50": 0.3, "bbox_mAP_s": -1.0}


def _train(work_dir: Path, by_epoch: bool, length: int) -> Runner:
    """26 samples in batches of two: 13 iterations an epoch, logged every fifth."""
    loader = dict(
        batch_size=2, num_workers=0, dataset=[torch.ones(2)] * 26, sampler=dict(type="DefaultSampler", shuffle=False)
    )
    steps = dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length)
    checkpoint = dict(type="CheckpointHook", by_epoch=by_epoch, interval=1 if by_epoch else 10)
    runner = Runner(
        _Model(), str(work_dir), train_dataloader=loader, val_dataloader=loader, test_dataloader=loader,
        train_cfg=dict(**steps, val_interval=1 if by_epoch else 10), val_cfg=dict(), test_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)), val_evaluator=[_Metric()], test_evaluator=[_Metric()],
        default_hooks=dict(logger=dict(type="LoggerHook", interval=5), checkpoint=checkpoint),
        log_processor=dict(by_epoch=by_epoch),
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        randomness=dict(seed=3), experiment_name=f"{work_dir.name}_{length}",
        cfg=Config(dict(randomness=dict(seed=3), load_from="a.pth", work_dir=str(work_dir))),
    )  # fmt: skip
    runner.train()
    return runner


def test_a_real_run_by_epochs(tmp_path: Path) -> None:
    runner = _train(tmp_path, True, 2)
    runner.test()
    log = read_training_log(tmp_path)
    assert log.scalars["loss"].steps == (5, 10, 18, 23)
    assert log.validation["mAP"].steps == (13, 26), "epochs are given as iterations"
    assert log.validation["mAP"].values == (0.123, 0.123)
    assert log.validation["mAP_s"].values == (None, None), "COCO's -1 is no number"
    assert log.iterations == 26
    assert log.seconds is not None and 0 < log.seconds < 60
    assert read_test_metrics(tmp_path) == {"mAP": 0.123, "mAP50": 0.3, "mAP_s": None}
    assert find_checkpoint(tmp_path).name == "epoch_2.pth"
    dumped = read_dumped_config(tmp_path)
    assert dumped is not None and seed_of(dumped[1]) == 3 and checkpoint_of(dumped[1]) == "a.pth"


def test_a_real_run_by_iterations(tmp_path: Path) -> None:
    _train(tmp_path, False, 22)
    log = read_training_log(tmp_path)
    assert log.scalars["loss"].steps == (5, 10, 15, 20)
    assert log.validation["mAP"].steps == (10, 20)
    assert log.iterations == 22
    assert log.mask.empty_from is None


def test_a_resumed_run_replaces_what_was_given_up(tmp_path: Path) -> None:
    write_session(tmp_path, "20260101_100000", range(10, 161, 10), loss=9.0)
    write_session(tmp_path, "20260101_110000", range(110, 201, 10), loss=1.0, mask=True)
    log = read_training_log(tmp_path)
    loss = log.scalars["loss"]
    assert loss.steps == tuple(range(10, 201, 10))
    values = dict(zip(loss.steps, loss.values, strict=True))
    assert values[100] is not None and values[100] > 2, "of the first session"
    assert all(value is not None and value < 0.5 for step, value in values.items() if step > 100), "of the second"
    assert log.validation["mAP"].steps == (50, 100, 150, 200)
    assert log.seconds == pytest.approx(200 * 0.5)


def test_a_run_begun_anew_forgets_the_old_one(tmp_path: Path) -> None:
    write_session(tmp_path, "20260101_100000", range(10, 201, 10), loss=9.0)
    write_session(tmp_path, "20260101_110000", range(10, 41, 10), loss=1.0)
    log = read_training_log(tmp_path)
    assert log.scalars["loss"].steps == (10, 20, 30, 40)
    assert log.validation == {}


def test_the_mask_series_are_by_layer_and_in_their_order(tmp_path: Path) -> None:
    write_session(tmp_path, "20260101_100000", range(10, 201, 10), mask=True)
    path = tmp_path / "20260101_100000" / "vis_data" / "scalars.json"
    extra = {f"mask/kept_fraction/blocks.{i}": 0.0 for i in (10, 9)}
    path.write_text(path.read_text() + json.dumps({**extra, "step": 200}) + "\n")
    log = read_training_log(tmp_path)
    assert list(log.mask.kept_fraction) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.9", "blocks.10"]
    assert log.mask.empty_from == 160
    assert not any(key.startswith("mask") for key in log.scalars)


def test_a_row_cut_short_by_a_kill_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_session(tmp_path, "20260101_100000", range(10, 51, 10))
    path = tmp_path / "20260101_100000" / "vis_data" / "scalars.json"
    text = path.read_text()
    path.write_text(text + '{"loss": NaN, "iter": 51, "step": 51}\n{"loss": 0.3, "it')
    loss = read_training_log(tmp_path).scalars["loss"]
    assert loss.steps == (10, 20, 30, 40, 50, 51) and loss.values[-1] is None, "a loss that is not finite is None"
    for damaged in ("{broken", "3", '{"step": "a"}', '{"iter": null}', "[" * 100_000):
        path.write_text(f"{damaged}\n{text}")
        with pytest.raises(ValueError, match=r"scalars\.json, line 1: not a JSON object"):
            read_training_log(tmp_path)


def test_the_newest_test_counts_and_one_without_figures_names_the_fix(tmp_path: Path) -> None:
    log = read_training_log(tmp_path)
    assert log.scalars == {} and log.iterations is None and log.seconds is None, "an empty folder has no training"
    with pytest.raises(ValueError, match=r"no <time>/<time>\.json.*run tools/test\.py"):
        read_test_metrics(tmp_path)
    write_test(tmp_path, mAP=0.2, time="20251231_090000")
    write_test(tmp_path, mAP=0.1)
    assert read_test_metrics(tmp_path)["mAP"] == 0.1 and read_test_metrics(tmp_path)["mAP_l"] is None
    path = tmp_path / "20260101_120000" / "20260101_120000.json"
    path.write_text('{"data_time": 0.1}')
    with pytest.raises(ValueError, match=r"120000\.json: no box mAP; .*found nothing at all"):
        read_test_metrics(tmp_path)
    for damaged in (b'{"coco/bbox_mAP": 0.', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"120000\.json: not readable as the metrics of a test"):
            read_test_metrics(tmp_path)


def test_metrics_are_found_whatever_their_prefix() -> None:
    assert coco_metrics({"val/coco/bbox_mAP": 0.5, "bbox_mAP_75": 0.1, "coco/segm_mAP": 0.9, "tree_precision": 1}) == {
        "mAP": 0.5,
        "mAP75": 0.1,
    }


def test_the_last_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    (tmp_path / "iter_100.pth").write_bytes(b"older")
    assert find_checkpoint(tmp_path) == path
    path.unlink()
    with pytest.raises(ValueError, match=r"last_checkpoint names iter_200\.pth, which is not in"):
        find_checkpoint(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    assert find_checkpoint(tmp_path).name == "iter_100.pth"
    (tmp_path / "b.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found b\.pth, iter_100\.pth; give checkpoint=FILE"):
        find_checkpoint(tmp_path)


def test_configs_commands_and_manifests(tmp_path: Path) -> None:
    write_test(tmp_path, mAP=0.1, attention="linear", seed=7)
    found = read_dumped_config(tmp_path)
    assert found is not None
    assert attention_of(found[1]) == "linear" and seed_of(found[1]) == 7 and checkpoint_of(found[1]) is None
    assert read_dumped_config(tmp_path / "nowhere") is None
    assert network_shape(found[1], (64, 64)) == (128, 128)
    assert network_shape(found[1], (100, 50)) == (128, 64)
    assert network_shape(Config(dict()), (100, 50)) == (100, 50)
    (tmp_path / "train.done.json").write_text(json.dumps({"command": [str(Path.cwd() / "x.py"), "a b"], "key": ""}))
    assert read_commands(tmp_path) == ["x.py 'a b'"]
    for damaged in ([], {"command": "x"}, {"command": [1]}, {}):
        (tmp_path / "test.done.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"test\.done\.json: not readable as a finished command"):
            read_commands(tmp_path)
    checkpoint = tmp_path / "deploy.pth"
    assert source_of(checkpoint) is None
    checkpoint.with_suffix(".json").write_text(json.dumps({"source": {"path": "a/b.pth", "sha256": ""}}))
    assert source_of(checkpoint) == Path("a/b.pth")
    checkpoint.with_suffix(".json").write_text(json.dumps({"source": 3}))
    with pytest.raises(ValueError, match=r"deploy\.json: not readable as a manifest"):
        source_of(checkpoint)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.98], ids=["empty", "half", "without its end"])
def test_a_config_that_a_killed_run_dumped_in_part_is_refused(tmp_path: Path, part: float) -> None:
    write_test(tmp_path, mAP=0.1)
    path = next(tmp_path.glob("*/vis_data/config.py"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: int(part * len(lines))]))
    with pytest.raises(ValueError, match=r"config\.py: (has no `work_dir`.*--resume|cannot be read: SyntaxError)"):
        read_dumped_config(tmp_path)
