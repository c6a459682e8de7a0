"""Safe reading: what a real Runner saves is read, everything else is refused and nothing in it is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import ClassVar

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from castling_det.conversion import WEIGHTS, load_checkpoint, select_weights


class Points(Dataset):
    metainfo: ClassVar = dict(classes=("a", "b"), palette=[(1, 2, 3)])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(x=torch.full((4,), float(index)))


class Regressor(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, mode="loss"):
        return dict(loss=(self.norm(self.linear(x)) - 1).square().mean())


@pytest.fixture(scope="module")
def real_checkpoint(tmp_path_factory):
    """Saved by mmengine's own Runner after three iterations with an EMAHook; path, and the model that it left."""
    work_dir = tmp_path_factory.mktemp("runner")
    runner = Runner(
        model=Regressor(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Points(),
            batch_size=2,
            sampler=dict(type="InfiniteSampler"),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1), clip_grad=dict(max_norm=1.0)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=2),
            dict(type="MultiStepLR", milestones=[2], by_epoch=False),
            dict(type="CosineAnnealingLR", by_epoch=False),
        ],
        custom_hooks=[dict(type="EMAHook", momentum=0.5)],
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=3, by_epoch=False),
            logger=dict(type="LoggerHook", interval=1),
        ),
        default_scope="mmengine",
        experiment_name=f"conversion-{os.getpid()}",
    )
    runner.train()
    return work_dir / "iter_3.pth", runner.model


def test_a_runner_checkpoint_is_read_whole(real_checkpoint):
    path, _ = real_checkpoint
    checkpoint = load_checkpoint(path)
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "ema_state_dict"} <= set(checkpoint)
    assert checkpoint["meta"]["iter"] == 3 and checkpoint["meta"]["dataset_meta"]["classes"] == ("a", "b")
    assert "train/loss" in checkpoint["message_hub"]["log_scalars"]
    with pytest.raises(pickle.UnpicklingError):  # torch alone refuses it, so the list of allowed names is needed
        torch.load(path, weights_only=True)


def test_ema_and_online_weights_are_the_ones_of_the_run(real_checkpoint):
    path, model = real_checkpoint
    checkpoint = load_checkpoint(path)
    online, ema, auto = (select_weights(checkpoint, path, kind) for kind in ("online", "ema", "auto"))
    torch.testing.assert_close(online.tensors, dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(auto.tensors, ema.tensors, rtol=0, atol=0)
    assert not torch.equal(ema.tensors["linear.weight"], online.tensors["linear.weight"])
    assert (auto.kind, auto.key, online.kind, online.key) == ("ema", "state_dict", "online", "ema_state_dict")
    assert list(online.dropped) == ["ema_state_dict.steps"]


@pytest.mark.parametrize("wrap", ["state_dict", "model", "teacher", None])
def test_a_state_dict_is_found_where_others_put_it(tmp_path, wrap):
    tensors = {"a.weight": torch.randn(2, 3)}
    path = tmp_path / "weights.pth"
    torch.save({wrap: tensors, "epoch": 3} if wrap else tensors, path)
    weights = select_weights(load_checkpoint(path), path)
    assert weights.key == (wrap or "") and weights.kind == "only"
    torch.testing.assert_close(weights.tensors, tensors)
    with pytest.raises(ValueError, match=r"weights='ema'.*no average"):
        select_weights(load_checkpoint(path), path, "ema")


@pytest.mark.parametrize(("key", "ema_key"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_timm_and_deit_keep_the_average_beside(tmp_path, key, ema_key):
    path = tmp_path / "weights.pth"
    torch.save({key: {"w": torch.zeros(1)}, ema_key: {"w": torch.ones(1)}}, path)
    values = {kind: float(select_weights(load_checkpoint(path), path, kind).tensors["w"]) for kind in WEIGHTS}
    assert values == {"auto": 1.0, "ema": 1.0, "online": 0.0}


def test_safetensors_and_the_old_torch_format(tmp_path):
    tensors = {"a": torch.randn(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "old.pth"):
        torch.testing.assert_close(load_checkpoint(tmp_path / name), tensors)


def _zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")


UNUSABLE = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("hello " * 50), "not a checkpoint"),
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99), "a PNG image"),
    "page": (lambda path: path.write_text("<html>404</html>"), "HTML"),
    "zip": (_zip_of_text, "another zip archive"),
    "number": (lambda path: torch.save(3, path), "holds a int"),
    "random pickle bytes": (
        lambda path: path.write_bytes(b"\x80\x02" + bytes(range(200))),
        "not a checkpoint|damaged",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_checkpoint_is_refused(tmp_path, case):
    make, message = UNUSABLE[case]
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "x.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_refused(tmp_path, name, share):
    tensors = {"a": torch.randn(5000), "b": torch.randn(5000)}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "new.pth")
    load_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"truncated or damaged|no whole safetensors file|not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("key", [None, "w", "state_dict"])
def test_without_a_state_dict(tmp_path, key):
    path = tmp_path / "x.pth"
    torch.save({key: 3} if key else {}, path)
    with pytest.raises(ValueError, match="no state dict"):
        select_weights(load_checkpoint(path), path)
