"""MMDetection's own tools and functions, used as its users are used to them, on the tree-crown configs.

The tools are the installed package's files, each run as a script in a process of its own.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.fileio import load

from castling_det.compat.host import mmdet_tool
from castling_det.conversion import convert, load_checkpoint
from tests.processes import process_context
from tests.stacks import needs_torch

pytestmark = pytest.mark.slow
SAFE = needs_torch(2, 6, why="checkpoints are not read")

ROOT = Path(__file__).parents[1]
CONFIG = "configs/castling_vit/gfl_castling-vit-nano_{}_tree-crowns.py"
IMAGES = sorted((ROOT / "data/tree_crowns/val").glob("*.png"))[:2]
SMALL = [
    "model.test_cfg.score_thr=0.0",
    *(
        f"{split}_dataloader.{option}"
        for split in ("train", "val", "test")
        for option in ("num_workers=0", "persistent_workers=False", "batch_size=2", "dataset.indices=2")
    ),
]
"""For --cfg-options: two images, read by the process itself; after four iterations all scores are low."""
FOUR_ITERATIONS = [
    "train_cfg.max_iters=4",
    "train_cfg.val_interval=4",
    "default_hooks.checkpoint.interval=2",
    "default_hooks.logger.interval=1",
]


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str

    def succeeded(self) -> str:
        """What it printed; fails if it failed."""
        assert self.code == 0, self.output[-3000:]
        return self.output


def run(log: Path, name: str, *arguments: object, **environment: str) -> Outcome:
    """Runs one of MMDetection's tools in the root of the checkout; `log` holds what it prints."""
    process = process_context().Process(target=_run, args=(log, name, [*map(str, arguments)], environment))
    process.start()
    process.join(300)
    assert process.exitcode is not None, f"{name} has not ended after 300 s: {log.read_text()[-3000:]}"
    return Outcome(process.exitcode, log.read_text(encoding="utf-8"))


def _run(log: Path, name: str, arguments: list[str], environment: dict[str, str]) -> None:
    with log.open("wb") as written:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    os.environ |= environment
    os.chdir(ROOT)
    path = mmdet_tool(name)
    # As for a script: the folder it lies in is where its imports are looked for first.
    sys.argv, sys.path[0] = [path, *arguments], str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


def train(folder: Path, *arguments: object, options: Sequence[str] = ()) -> Outcome:
    """train.py on a tree-crown config, for four iterations."""
    command = [CONFIG.format("castling"), "--work-dir", folder, *arguments]
    command += ["--cfg-options", *SMALL, *FOUR_ITERATIONS, *options]
    return run(folder.with_suffix(".log"), "train.py", *command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of a training of four iterations that is to scale its rate for a batch of two."""
    folder = tmp_path_factory.mktemp("habits") / "run"
    folder.with_suffix(".txt").write_text(train(folder, "--auto-scale-lr").succeeded(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def log_of_training(trained: Path) -> Path:
    (log,) = trained.glob("*/vis_data/2*.json")
    return log


@SAFE
def test_train_with_options_and_a_scaled_rate(trained: Path) -> None:
    printed = trained.with_suffix(".txt").read_text(encoding="utf-8")
    assert "coco/bbox_mAP:" in printed
    # The configs' batch is four images.
    assert re.search(r"LR is set based on batch size of 4 and the current batch size is 2", printed), printed[-3000:]
    assert load_checkpoint(trained / "iter_4.pth")["optimizer"]["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)


def test_resume(trained: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", "--resume", trained / "iter_4.pth", options=["train_cfg.max_iters=6"]).succeeded()
    assert "resumed epoch: 0, iter: 4" in output and (tmp_path / "run/iter_6.pth").exists()


def test_amp(tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", "--amp")
    if torch.cuda.is_available():
        assert "loss_bbox" in outcome.succeeded()
    else:
        assert outcome.code != 0 and "is only available training on gpu" in outcome.output


def test_tta_and_analyze_results(trained: Path, tmp_path: Path) -> None:
    """test.py with flipped images too; then its detections, drawn beside the ground truth."""
    predictions = tmp_path / "predictions.pkl"
    command = [CONFIG.format("castling"), trained / "iter_4.pth", "--tta", "--out", predictions, "--work-dir", tmp_path]
    printed = run(tmp_path / "test.log", "test.py", *command, "--cfg-options", *SMALL).succeeded()
    assert "coco/bbox_mAP:" in printed and len(load(predictions)) == 2
    command = [CONFIG.format("castling"), predictions, tmp_path / "drawn", "--topk", 1, "--cfg-options", *SMALL]
    run(tmp_path / "analysis.log", "analysis_tools/analyze_results.py", *command).succeeded()
    assert len(list((tmp_path / "drawn").glob("good/*.png"))) == 1 == len(list((tmp_path / "drawn").glob("bad/*.png")))


def test_analyze_logs(log_of_training: Path, tmp_path: Path) -> None:
    tool = "analysis_tools/analyze_logs.py"
    assert "average iter time" in run(tmp_path / "time.log", tool, "cal_train_time", log_of_training).succeeded()
    figure = tmp_path / "loss.png"
    arguments = ["plot_curve", log_of_training, "--keys", "loss_cls", "--out", figure, "--backend", "agg"]
    arguments += ["--style", "default"]  # the tool's own default is no style of matplotlib
    run(tmp_path / "curve.log", tool, *arguments).succeeded()
    assert figure.stat().st_size > 1000


def test_get_flops_takes_softmax_as_free(tmp_path: Path) -> None:
    """MMEngine's counter knows matrix products, and not fused softmax attention: docs/troubleshooting.md."""
    counted = {}
    for attention in ("softmax", "deploy"):
        options = ["--num-images", 1, "--cfg-options", *SMALL]
        log = tmp_path / f"{attention}.log"
        printed = run(log, "analysis_tools/get_flops.py", CONFIG.format(attention), *options).succeeded()
        assert ("aten::scaled_dot_product_attention encountered" in printed) == (attention == "softmax")
        (counted[attention],) = map(float, re.findall(r"^Flops: ([\d.]+)G$", printed, re.MULTILINE))
    assert counted["softmax"] < counted["deploy"]


def test_browse_dataset(tmp_path: Path) -> None:
    options = ["--output-dir", tmp_path / "drawn", "--not-show", "--cfg-options", *SMALL]
    run(tmp_path / "log", "analysis_tools/browse_dataset.py", CONFIG.format("castling"), *options).succeeded()
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_print_config(tmp_path: Path) -> None:
    saved = tmp_path / "whole.py"
    options = ["--save-path", saved, "--cfg-options", "model.backbone.depth=2"]
    run(tmp_path / "log", "misc/print_config.py", CONFIG.format("castling"), *options).succeeded()
    config = Config.fromfile(saved)
    assert config.model.backbone.depth == 2 and config.model.backbone.type == "castling_det.CastlingViT"


@SAFE
def test_publish_model(trained: Path, tmp_path: Path) -> None:
    """Torch reads a converted checkpoint without running code; a training's only where it is told to trust the file."""
    converted = tmp_path / "deploy.pth"
    convert(CONFIG.format("castling"), trained / "iter_4.pth", converted, num_probes=1)
    for source, trust in ((converted, "0"), (trained / "iter_4.pth", "1")):
        command = ["model_converters/publish_model.py", source, tmp_path / "p.pth"]
        run(tmp_path / "log", *command, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=trust).succeeded()
    refused = run(tmp_path / "log", "model_converters/publish_model.py", trained / "iter_4.pth", tmp_path / "p.pth")
    assert "Weights only load failed" in refused.output
    contents = [set(load_checkpoint(path)) for path in tmp_path.glob("p-*.pth")]
    assert contents == [{"meta", "state_dict"}] * 2


def test_inference_functions_agree(trained: Path) -> None:
    config, checkpoint = str(ROOT / CONFIG.format("castling")), str(trained / "iter_4.pth")
    model = init_detector(config, checkpoint, device="cpu", cfg_options={"model.test_cfg.score_thr": 0.0})
    assert model.dataset_meta["classes"] == ("tree",)
    results = [sample.pred_instances for sample in inference_detector(model, [str(image) for image in IMAGES])]
    inferencer = DetInferencer(config, checkpoint, device="cpu", show_progress=False)
    inferencer.model.test_cfg.score_thr = inferencer.model.bbox_head.test_cfg.score_thr = 0.0
    answers = inferencer([str(image) for image in IMAGES], pred_score_thr=0.0)["predictions"]
    for result, answer in zip(results, answers, strict=True):
        assert len(result.bboxes) > 3
        np.testing.assert_allclose(np.array(answer["bboxes"]), result.bboxes.numpy(), rtol=0, atol=1e-2)
        np.testing.assert_allclose(np.array(answer["scores"]), result.scores.numpy(), rtol=0, atol=1e-4)
