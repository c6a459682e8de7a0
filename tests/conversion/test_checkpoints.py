"""Safe reading: the average is found where others put it, and a file that is no checkpoint is refused."""

from __future__ import annotations

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from castling_det.conversion import WEIGHTS, load_checkpoint, select_weights


@pytest.mark.parametrize(("key", "ema_key"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_timm_and_deit_keep_the_average_beside(tmp_path, key, ema_key):
    path = tmp_path / "weights.pth"
    torch.save({key: {"w": torch.zeros(1)}, ema_key: {"w": torch.ones(1)}}, path)
    values = {kind: float(select_weights(load_checkpoint(path), path, kind).tensors["w"]) for kind in WEIGHTS}
    assert values == {"auto": 1.0, "ema": 1.0, "online": 0.0}
    torch.save({key: {"w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"weights='ema'.*no average"):
        select_weights(load_checkpoint(path), path, "ema")


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
    "random bytes": (lambda path: path.write_bytes(b"\x80\x02" + bytes(range(200))), "not a checkpoint|damaged"),
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
