"""The classes of the head against those of the data, before the first iteration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from castling_det.engine import ClassCountHook


def runner(num_classes, classes):
    model = nn.Module()
    model.bbox_head = nn.Linear(1, 1)
    model.bbox_head.num_classes = num_classes
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": classes}))
    return SimpleNamespace(model=model, train_dataloader=loader, val_dataloader=loader, test_dataloader=loader)


@pytest.mark.parametrize("stage", ["before_train", "before_val", "before_test"])
def test_disagreement_names_both_and_the_fix(stage):
    with pytest.raises(ValueError, match=r"(?s)names 1 .*bbox_head.num_classes=80.*write num_classes=1"):
        getattr(ClassCountHook(), stage)(runner(80, ("tree",)))
    getattr(ClassCountHook(), stage)(runner(1, ("tree",)))
