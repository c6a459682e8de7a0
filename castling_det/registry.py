"""Child registries of MMEngine's: any MMDetection config finds `type='castling_det.X'` without `custom_imports`.

MMEngine builds everything that a config inherits from `_base_ = 'castling_det::...'` in the scope `castling_det`, also
MMDetection's own types (`GFL`, `Resize`). So each of its kinds has a registry here, which asks MMDetection's.
"""

from importlib import import_module
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry


class HostedRegistry(Registry):
    """Looks a name without a scope up in MMDetection's registry before MMEngine's, where `Resize` is MMCV's."""

    def get(self, key: str) -> Any:
        self.import_from_location()
        if "." in key or key in self.module_dict:
            return super().get(key)
        import_module("mmdet.registry")
        host = self.root.children.get("mmdet")
        return super().get(key) if host is None else host.get(key)


def _registry(kind: str, *locations: str) -> HostedRegistry:
    parent = getattr(mmengine_registry, kind)
    # MMEngine asks for at least one location; this module is one that adds nothing.
    return HostedRegistry(parent.name, parent=parent, scope="castling_det", locations=[*(locations or [__name__])])


MODELS = _registry("MODELS", "castling_det.models")
DATASETS = _registry("DATASETS", "castling_det.datasets.coco")
HOOKS = _registry("HOOKS", "castling_det.engine")
OPTIM_WRAPPERS = _registry("OPTIM_WRAPPERS", "castling_det.engine")
OPTIM_WRAPPER_CONSTRUCTORS = _registry("OPTIM_WRAPPER_CONSTRUCTORS", "castling_det.engine")
TASK_UTILS = _registry("TASK_UTILS", "castling_det.models")
WEIGHT_INITIALIZERS = _registry("WEIGHT_INITIALIZERS", "castling_det.conversion.pretrained")
# Nothing of ours is registered under the other kinds.
for _kind in mmengine_registry.__all__:
    if _kind not in globals() and isinstance(getattr(mmengine_registry, _kind), Registry):
        _registry(_kind)
