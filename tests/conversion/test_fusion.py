"""`tools/convert.py --fuse`: the same maps, a config that loads the file strictly, and its record."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from mmdet.apis import init_detector

from castling_det.conversion import convert, fusion, load_checkpoint
from castling_det.conversion.detectors import build_detector, load_exactly, with_attention
from castling_det.models import fuse_detector
from tests.compare import assert_parity
from tests.conversion.conftest import EMPTY, FAST, randomised_state
from tools import convert as tool

pytestmark = pytest.mark.usefixtures("quick_macs")


@pytest.fixture
def normed(tiny_config, tmp_path):
    """The config and a checkpoint of a detector with BatchNorm in its stem and layer scale in its blocks."""
    tiny_config.model.backbone.update(stem="conv", init_values=0.2)
    config = tmp_path / "castling.py"
    tiny_config.dump(config)
    state = randomised_state(build_detector(tiny_config))
    state = {name: value.abs() + 0.3 if name.endswith("running_var") else value for name, value in state.items()}
    source = tmp_path / "source.pth"
    torch.save({"meta": {"cfg": tiny_config.pretty_text, "castling_det": {"mask": EMPTY}}, "state_dict": state}, source)
    return config, source, tmp_path / "fused.pth"


def maps(model):
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        features = model.extract_feat(image)
        return [*features, *(level for group in model.bbox_head(features) for level in group)]


def test_the_fused_file_loads_strictly_into_the_config_beside_it(normed, tmp_path, tiny_config):
    config, source, out = normed
    manifest = convert(config, source, out, fuse=True, **FAST)
    plain = tmp_path / "plain.pth"
    convert(config, source, plain, **FAST)
    expected = init_detector(with_attention(tiny_config, "linear"), str(plain), device="cpu")
    fused = init_detector(str(out.with_suffix(".py")), str(out), device="cpu")
    load_exactly(fused, load_checkpoint(out)["state_dict"], out)
    assert type(fused) is type(expected)
    for before, after in zip(maps(expected), maps(fused), strict=True):
        assert_parity(after, before, rms=1e-5, maximum=1e-4)

    names = set(load_checkpoint(out)["state_dict"])
    assert not any("running_mean" in name or "ls1" in name for name in names)
    record = json.loads(out.with_suffix(".json").read_text())["fusion"]
    assert manifest.fusion.folded == record["folded"] == {"convolutions in sequence": 3, "layer scales": 4}
    assert {"backbone.0", "neck.0", "head.0"} <= set(record["drift"])
    assert record["before_ms"] > 0 and record["after_ms"] > 0 and record["shape"] == [64, 64]
    assert 0 <= manifest.fusion.max_abs_drift < 1e-4
    assert "before, " in manifest.summary() and "3 convolutions in sequence" in manifest.summary()


def test_a_fusion_that_changes_the_maps_is_refused_and_nothing_is_written(normed, monkeypatch):
    config, source, out = normed

    def wrong(model):
        folded = fuse_detector(model)
        with torch.no_grad():
            model.backbone.stem[0].bias += 0.1
        return folded

    monkeypatch.setattr(fusion, "fuse_detector", wrong)
    with pytest.raises(ValueError, match="more than rounding does"):
        convert(config, source, out, fuse=True, **FAST)
    assert sorted(path.name for path in out.parent.iterdir()) == ["castling.py", "source.pth"]


def test_a_detector_without_norms_is_refused(tiny_config_file, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint()
    with pytest.raises(ValueError, match="no BatchNorm and no layer scale to fuse"):
        convert(tiny_config_file, source, tmp_path / "fused.pth", fuse=True, **FAST)
    assert not (tmp_path / "fused.pth").exists()


def test_without_the_option_there_is_no_config_and_no_record(normed):
    config, source, out = normed
    assert convert(config, source, out, **FAST).fusion is None
    assert not out.with_suffix(".py").exists()


def test_the_tool_takes_the_option(normed, capsys):
    arguments = [str(value) for value in normed]
    assert tool.main([*arguments, "--fuse", "--shape", "64", "64", "--num-probes", "1"]) == 0
    assert "layer scales" in capsys.readouterr().out
    assert tool.main([*arguments, "--fuse", "--from-softmax"]) == 1
    assert "--fuse: has no meaning with --from-softmax" in capsys.readouterr().err


def test_the_linear_detector_itself_is_left_as_it_was(tiny_config):
    tiny_config.model.backbone.update(stem="conv")
    model = build_detector(with_attention(tiny_config, "linear"))
    before = copy.deepcopy(model.state_dict())
    fusion.fused_twin(model, [torch.randn(1, 3, 64, 64)])
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
