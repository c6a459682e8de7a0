"""One import hook, so that MMDetection's own tools find this package without an edited file.

`tools/train.py` reads its config before it imports this package, and without compiled operators `import mmdet.models`
fails. So `castling_det.pth` in site-packages installs the hook when the interpreter starts. It acts on two modules:

- `mmengine.config.utils`: registers this package, so that `_base_ = "castling_det::..."` is found.
- `mmcv._ext`: gives the stand-in operators of `castling_det.compat` where MMCV was built without its own.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would cost every start of the interpreter 8 ms
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["STAND_IN_ORIGIN", "ImportHook", "at_interpreter_start", "install"]

CONFIGS, OPERATORS = "mmengine.config.utils", "mmcv._ext"
STAND_IN_ORIGIN = "castling_det.compat"


def install() -> None:
    """Installs the hook once, also where several copies of the package call it."""
    if CONFIGS in sys.modules:
        register_configs(sys.modules[CONFIGS])
    if not any(hasattr(finder, "castling_det_hook") for finder in sys.meta_path):
        sys.meta_path.insert(0, ImportHook())


def at_interpreter_start() -> None:
    """Installs the hook and unloads the package: a checkout earlier on the path must win over this one."""
    install()
    for name in ("castling_det.startup", "castling_det"):
        sys.modules.pop(name, None)


def register_configs(config_utils: ModuleType) -> None:
    """Makes MMEngine find `castling_det::` configs.

    MMEngine looks next to the package's metadata. An editable install is not there, so we name this module instead,
    which MMEngine imports to find its folder.
    """
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path

    try:
        beside = Path(str(distribution("castling_det").locate_file("castling_det"))).is_dir()
    except PackageNotFoundError:
        beside = False
    config_utils.MODULE2PACKAGE.setdefault("castling_det", "castling_det" if beside else __name__)


class ImportHook:
    """Finds `mmengine.config.utils`; finds and loads the stand-in for `mmcv._ext`."""

    castling_det_hook = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in (CONFIGS, OPERATORS):
            return None
        from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

        spec = PathFinder.find_spec(name, path, target)
        if name == OPERATORS:  # Compiled operators always win.
            return spec or ModuleSpec(name, self, origin=STAND_IN_ORIGIN)  # type: ignore[arg-type]  # duck-typed loader
        if spec is not None and isinstance(spec.loader, SourceFileLoader):

            class Registering(SourceFileLoader):
                def exec_module(self, module: ModuleType) -> None:
                    super().exec_module(module)
                    register_configs(module)

            spec.loader = Registering(spec.loader.name, spec.loader.path)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from castling_det.compat.stand_in import create_stand_in

        return create_stand_in(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        from castling_det.compat.stand_in import announce

        announce()
