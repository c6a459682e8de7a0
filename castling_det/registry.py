"""Child registries of mmengine's, so that `type='castling_det.X'` is found by any MMDetection config.

`locations` are imported at the first look-up: no `custom_imports`, no edited `train.py`.

mmengine builds what a config inherits from `_base_ = 'castling_det::...'` in the scope `castling_det`, and
that includes MMDetection's own types (`GFL`, `Resize`, `CocoMetric`). So there is a registry here for each
of MMDetection's, and a name without a scope that is not ours is looked up there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

__all__ = [
    "DATASETS",
    "HOOKS",
    "MODELS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "TASK_UTILS",
    "WEIGHT_INITIALIZERS",
    "HostedRegistry",
]

SCOPE = "castling_det"
HOST = "mmdet"
BORROWED = (
    "DATA_SAMPLERS",
    "EVALUATOR",
    "LOG_PROCESSORS",
    "LOOPS",
    "METRICS",
    "MODEL_WRAPPERS",
    "OPTIMIZERS",
    "PARAM_SCHEDULERS",
    "RUNNERS",
    "RUNNER_CONSTRUCTORS",
    "TRANSFORMS",
    "VISBACKENDS",
    "VISUALIZERS",
)
"""Kinds that this package adds nothing to."""


class HostedRegistry(Registry):
    """Asks MMDetection's registry of the same kind for a name without a scope that it does not hold.

    Before mmengine's, the parent of both: the `Resize` there is mmcv's, not MMDetection's.
    """

    def get(self, key: str) -> Any:
        scope, name = self.split_scope_key(key)
        self.import_from_location()
        if scope is not None or name in self.module_dict:
            return super().get(key)
        import_module(f"{HOST}.registry")
        host = self.root.children.get(HOST)
        return super().get(key) if host is None else host.get(key)


def _registry(kind: str, location: str = __name__) -> HostedRegistry:
    # mmengine wants at least one location; this module is one that is there and adds nothing.
    parent = getattr(mmengine_registry, kind)
    return HostedRegistry(parent.name, parent=parent, scope=SCOPE, locations=[location])


MODELS = _registry("MODELS", "castling_det.models")
DATASETS = _registry("DATASETS", "castling_det.datasets.coco")
HOOKS = _registry("HOOKS", "castling_det.engine")
OPTIM_WRAPPERS = _registry("OPTIM_WRAPPERS", "castling_det.engine")
OPTIM_WRAPPER_CONSTRUCTORS = _registry("OPTIM_WRAPPER_CONSTRUCTORS", "castling_det.engine")
TASK_UTILS = _registry("TASK_UTILS", "castling_det.models")
WEIGHT_INITIALIZERS = _registry("WEIGHT_INITIALIZERS", "castling_det.conversion.pretrained")
_borrowed = [_registry(kind) for kind in BORROWED]
