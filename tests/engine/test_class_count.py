"""The classes of the head against those of the data, before the first iteration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from castling_det.engine import ClassCountHook


def runner(num_classes, classes, base=512, enable=False):
    model = nn.Module()
    model.bbox_head = nn.Linear(1, 1)
    model.bbox_head.num_classes = num_classes
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": classes}), batch_size=8)
    scaling = {"base_batch_size": base, "enable": enable}
    loaders = {f"{stage}_dataloader": loader for stage in ("train", "val", "test")}
    return SimpleNamespace(model=model, cfg={"auto_scale_lr": scaling}, **loaders)


@pytest.mark.parametrize("stage", ["before_train", "before_val", "before_test"])
def test_disagreement_names_both_and_the_fix(stage):
    with pytest.raises(ValueError, match=r"(?s)names 1 .*bbox_head.num_classes=80.*write num_classes=1"):
        getattr(ClassCountHook(), stage)(runner(80, ("tree",)))
    getattr(ClassCountHook(), stage)(runner(1, ("tree",)))


@pytest.mark.parametrize(("base", "enable", "warns"), [(512, False, True), (512, True, False), (32, False, False),
                                                      (1, False, True), (None, False, False)])  # fmt: skip
def test_a_rate_that_belongs_to_another_batch_is_warned_of(base, enable, warns, monkeypatch):
    said = []
    monkeypatch.setattr("castling_det.engine.hooks.print_log", lambda text, **_: said.append(text))
    ClassCountHook().before_train(runner(1, ("tree",), base, enable))
    expected = f"belongs to a batch of {base} images (auto_scale_lr.base_batch_size), and this training has 8: "
    assert len(said) == warns and all(expected in text for text in said)
