"""Models are built in MMDetection's scope, whatever another test left behind."""

from __future__ import annotations

import pytest
from mmengine.registry import init_default_scope


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    init_default_scope("mmdet")
