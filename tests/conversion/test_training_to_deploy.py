"""The whole way: mmengine's Runner with our hook and an EMAHook trains, the tool converts what it saved."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch.utils.data import Dataset

from castling_det.conversion import load_checkpoint, select_weights
from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.layers import MaskState
from tests.conversion.conftest import set_options

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"
PROBE = ("--shape", "64", "64", "--num-probes", "1")


class Squares(Dataset):
    """Noise with one bright square, which is the object."""

    metainfo: ClassVar = dict(classes=("square", "other"), palette=[(255, 0, 0), (0, 255, 0)])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 100, (3, 64, 64), generator=generator, dtype=torch.uint8)
        image[:, 16:40, 16:40] = 250
        objects = InstanceData(bboxes=torch.tensor([[16.0, 16.0, 40.0, 40.0]]), labels=torch.tensor([0]))
        sample = DetDataSample(
            metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1)), gt_instances=objects
        )
        return dict(inputs=image, data_samples=sample)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trained_folder(tiny_config, tmp_path):
    """A folder with checkpoints of iterations 2 (mask open) and 6 (mask empty) and the config; the trained model."""
    set_options(tiny_config, threshold=0.001)
    tiny_config.model.backbone.init_cfg = None
    tiny_config.custom_hooks = [
        dict(type="EMAHook", momentum=0.5),
        dict(type="castling_det.MaskAnnealingHook", empty_from=0.6, interval=1),
    ]
    tiny_config.dump(tmp_path / "castling.py")
    runner = Runner(
        model=tiny_config.model,
        work_dir=str(tmp_path / "work"),
        train_dataloader=dict(
            dataset=Squares(),
            batch_size=2,
            sampler=dict(type="InfiniteSampler"),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=6),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
        custom_hooks=tiny_config.custom_hooks,
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False)),
        default_scope="mmdet",
        experiment_name=tmp_path.name,
        cfg=tiny_config,
    )
    runner.train()
    return tmp_path, runner.model


@torch.inference_mode()
def raw_outputs(model):
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    classes, boxes = model(image, mode="tensor")
    return [*classes, *boxes]


def test_what_the_runner_saves_is_read_whole(trained_folder):
    folder, model = trained_folder
    path = folder / "work" / "iter_6.pth"
    checkpoint = load_checkpoint(path)
    assert {"meta", "state_dict", "message_hub", "optimizer", "ema_state_dict"} <= set(checkpoint)
    assert checkpoint["meta"]["iter"] == 6 and "train/loss" in checkpoint["message_hub"]["log_scalars"]
    with pytest.raises(pickle.UnpicklingError):  # torch alone refuses it, so the list of allowed names is needed
        torch.load(path, weights_only=True)
    online, ema, auto = (select_weights(checkpoint, path, kind) for kind in ("online", "ema", "auto"))
    torch.testing.assert_close(online.tensors, dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(auto.tensors, ema.tensors, rtol=0, atol=0)
    assert not torch.equal(ema.tensors["neck.fpn_convs.0.conv.bias"], online.tensors["neck.fpn_convs.0.conv.bias"])
    assert (auto.kind, auto.key, online.kind, online.key) == ("ema", "state_dict", "online", "ema_state_dict")
    assert list(online.dropped) == ["ema_state_dict.steps"]


def test_a_training_run_converts_exactly_once_its_mask_is_empty(tool, trained_folder, capsys):
    folder, _ = trained_folder
    config, work, out = folder / "castling.py", folder / "work", folder / "deploy.pth"
    arguments = [str(config), str(work / "iter_6.pth"), str(out), *PROBE]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mask empty" in printed and "yes, by threshold" in printed and str(out.with_suffix(".json")) in printed
    assert "G with linear attention" in printed and "G with softmax attention" in printed
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["mask"]["origin"] == "checkpoint" and record["max_abs_drift"] == 0.0
    assert record["weights"]["kind"] == "ema" and record["command"].startswith("tools/convert.py ")
    assert record["notes"] == [], "the hook has recorded mask and options"

    checkpoint = load_checkpoint(work / "iter_6.pth")
    hybrid = build_detector(with_attention(Config.fromfile(config), "castling"))
    hybrid.load_state_dict(checkpoint["state_dict"])
    for block in hybrid.backbone.blocks:
        block.attn.eval_aux = True
        block.attn.mask_state = MaskState.from_meta(checkpoint["meta"]["castling_det"]["mask"])
    deployed = init_detector(with_attention(Config.fromfile(config), "linear"), str(out), device="cpu")
    torch.testing.assert_close(raw_outputs(deployed), raw_outputs(hybrid), rtol=0, atol=0)
    assert deployed.dataset_meta["classes"] == ("square", "other")


def test_a_checkpoint_from_before_is_refused(tool, trained_folder, capsys):
    folder, _ = trained_folder
    config, early, out = folder / "castling.py", folder / "work" / "iter_2.pth", folder / "deploy.pth"
    arguments = [str(config), str(early), str(out), *PROBE]
    assert tool.main(arguments) == 1 and not out.exists()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("convert: checkpoint") and "mask is not empty" in message
    assert tool.main([*arguments, "--allow-nonempty-mask", "--weights", "online"]) == 0
    printed = capsys.readouterr().out
    assert "mask empty" in printed and "NO" in printed and "drift neck.0" in printed
    assert json.loads(out.with_suffix(".json").read_text())["weights"]["kind"] == "online"


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unusable_checkpoints_leave_the_old_output(tool, tiny_config_file, runner_checkpoint, tmp_path, capsys):
    source, checkpoint = runner_checkpoint()
    out, canary = tmp_path / "out.pth", tmp_path / "canary"
    assert tool.main([str(tiny_config_file), str(source), str(out), *PROBE]) == 0
    old = out.read_bytes()
    whole = source.read_bytes()
    for spoil, message in [
        (lambda: source.write_bytes(whole[: len(whole) // 2]), "truncated or damaged"),
        (lambda: source.write_text("hello"), "not a checkpoint"),
        (lambda: torch.save({**checkpoint, "meta": Canary(canary)}, source), "could run code"),
        (lambda: source.write_bytes(old), "converted already"),
        (lambda: source.unlink(), "no such file"),
    ]:
        spoil()
        capsys.readouterr()
        assert tool.main([str(tiny_config_file), str(source), str(out), *PROBE]) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert error.strip().splitlines()[-1].startswith(f"convert: checkpoint {source}: ")
        assert out.read_bytes() == old and not canary.exists()
