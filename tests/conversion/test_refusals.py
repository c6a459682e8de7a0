"""What conversion refuses, by name, and that a write that fails leaves the old files."""

from __future__ import annotations

import errno
import math
import resource
from pathlib import Path

import pytest
import torch

from castling_det.conversion import convert
from castling_det.conversion.detectors import with_attention
from tests.conversion.conftest import EMPTY, FAST

pytestmark = pytest.mark.usefixtures("quick_macs")


def test_a_converted_checkpoint_is_not_converted_again(tiny_config, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY)
    convert(tiny_config, source, tmp_path / "a.pth", **FAST)
    with pytest.raises(ValueError, match="converted already"):
        convert(tiny_config, tmp_path / "a.pth", tmp_path / "b.pth", **FAST)


def _rename(state):
    state["backbone.blocks.0.attn.other.weight"] = state.pop("backbone.blocks.0.attn.dconv.weight")


def _reshape(state):
    state["bbox_head.gfl_cls.bias"] = torch.zeros(80)


def _diverge(state):
    state["neck.fpn_convs.0.conv.bias"][3] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"1 missing: backbone\.blocks\.0\.attn\.dconv\.weight; 1 unexpected: .*other\.weight"),
        (lambda state: state.pop("neck.fpn_convs.1.conv.bias"), r"1 missing: neck\.fpn_convs\.1\.conv\.bias"),
        (_reshape, r"1 of another shape: bbox_head\.gfl_cls\.bias \(80,\) for \(2,\)"),
        (_diverge, r"not finite in 1 tensors.*neck\.fpn_convs\.0\.conv\.bias"),
    ],
)
def test_another_architecture_is_refused_by_name(tiny_config, runner_checkpoint, tmp_path, change, message):
    source, checkpoint = runner_checkpoint(EMPTY)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, source)
    with pytest.raises(ValueError, match=message):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


@pytest.mark.parametrize("mode", ["softmax", "linear"])
def test_only_hybrids_are_converted(tiny_config, runner_checkpoint, tmp_path, mode):
    source, checkpoint = runner_checkpoint(EMPTY)
    checkpoint["meta"]["cfg"] = checkpoint["meta"]["cfg"].replace("'castling'", f"'{mode}'")
    torch.save(checkpoint, source)
    with pytest.raises(ValueError, match=f"its meta says attention='{mode}'"):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (dict(EMPTY, threshold="0.5"), r"\['threshold'\]='0.5'"),
        (dict(EMPTY, threshold=math.nan), r"\['threshold'\]=nan"),
        (dict(EMPTY, threshold_unit="percent"), r"\['threshold_unit'\]='percent'"),
        (dict(EMPTY, aux_scale=-2), r"\['aux_scale'\]=-2"),
    ],
)
def test_a_broken_mask_record_is_refused(tiny_config, runner_checkpoint, tmp_path, mask, message):
    source, _ = runner_checkpoint(mask)
    with pytest.raises(ValueError, match=message):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


def test_paths_and_options_are_checked(tiny_config, runner_checkpoint, tmp_path, photos):
    source, _ = runner_checkpoint(EMPTY)
    out = tmp_path / "deploy.pth"
    for arguments, options, message in [
        ((tiny_config, source, tmp_path / "deploy.json"), {}, r"expected a \.pth file"),
        ((tiny_config, source, source), {}, "is the source"),
        ((tiny_config, source, out), dict(weights="ema"), "no average"),
        ((tiny_config, source, out), dict(weights="best"), "weights='best'"),
        ((tiny_config, source, out), dict(num_probes=0), "num_probes=0"),
        ((tiny_config, source, out), dict(shape=(0, 64)), r"shape=\(0, 64\)"),
        ((tiny_config, source, out), dict(probe_images=[tmp_path / "none"]), "no such file or folder"),
        ((tiny_config, source, out), dict(probe_images=[photos / "notes.txt"]), "notes.txt: cannot be read"),
        ((tmp_path / "none.py", source, out), {}, r"none\.py: no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(*arguments, **{**FAST, **options})
    with_softmax = with_attention(tiny_config, "softmax")
    with pytest.raises(ValueError, match="attention='softmax': only a detector"):
        convert(with_softmax, source, out, **FAST)
    assert not out.exists()


def test_a_full_disk_leaves_the_old_files(tiny_config, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY)
    out = tmp_path / "deploy" / "deploy.pth"
    convert(tiny_config, source, out, **FAST)
    old = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the file system stops the write half-way
    try:
        with pytest.raises(OSError) as caught:
            convert(tiny_config, source, out, command="again", **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and "deploy.pth: cannot be written" in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == old


def test_no_manifest_without_its_checkpoint(tiny_config, runner_checkpoint, tmp_path, monkeypatch):
    source, _ = runner_checkpoint(EMPTY)
    out = tmp_path / "deploy" / "deploy.pth"

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tiny_config, source, out, **FAST)
    assert list(out.parent.iterdir()) == []
