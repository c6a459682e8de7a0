"""Three import hooks, so that MMDetection's own tools find this package without an edited file.

`tools/train.py` parses its config before it imports anything of ours, and without compiled operators
`import mmdet.models` fails; so the hooks are installed when the interpreter starts, by `castling_det.pth`
in site-packages. Nothing is imported until a hook is asked for its one module.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would cost every start of the interpreter 8 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["ROLES", "at_interpreter_start", "install", "is_installed"]

ROLES = ("config look-up", "ranks without a GPU", "operator fallback")
"""What the hooks are for, one each."""

CONFIG_MODULE = "mmengine.config.utils"
LAUNCHER_MODULE = "mmengine.dist.utils"
OPERATORS_MODULE = "mmcv._ext"
STAND_IN_ORIGIN = "castling_det.compat"


def install() -> None:
    """Installs the hooks, each at most once."""
    for role, name, action in (
        (ROLES[0], CONFIG_MODULE, _register_configs),
        (ROLES[1], LAUNCHER_MODULE, _allow_ranks_without_gpu),
    ):
        loaded = sys.modules.get(name)
        if loaded is not None:
            action(loaded)
        elif not is_installed(role):
            sys.meta_path.insert(0, AfterLoading(role, name, action))
    if not is_installed(OperatorFallback.role):
        # Last: it is asked only for what no other finder has, so compiled operators always win.
        sys.meta_path.append(OperatorFallback())


def is_installed(role: str) -> bool:
    """Whether a hook of this role is in place, put there by this or by another copy of the package."""
    return any(getattr(finder, "castling_det_role", None) == role for finder in sys.meta_path)


def at_interpreter_start() -> None:
    """What `castling_det.pth` calls: installs the hooks and leaves the package itself unimported.

    A checkout that stands earlier on the path than the installed package must still be the one imported.
    """
    install()
    for name in ("castling_det.startup", "castling_det"):
        sys.modules.pop(name, None)


def _register_configs(config_utils: ModuleType) -> None:
    """Makes `_base_ = 'castling_det::...'` resolve.

    mmengine takes the value for a distribution's name, metadata treats ours and the package's alike, and OpenMMLab's
    mmengine looks beside the metadata only, where an editable install does not lie. A module that is no distribution
    is imported by either mmengine, and the folder that it lies in is taken.
    """
    lies_there = _lies_beside_its_metadata()
    config_utils.MODULE2PACKAGE.setdefault("castling_det", "castling_det" if lies_there else __name__)


def _lies_beside_its_metadata() -> bool:
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path

    try:
        return Path(str(distribution("castling_det").locate_file("castling_det"))).is_dir()
    except PackageNotFoundError:
        return False


def _allow_ranks_without_gpu(dist_utils: ModuleType) -> None:
    from castling_det.compat.launcher import allow_ranks_without_gpu

    allow_ranks_without_gpu(dist_utils)


class AfterLoading:
    """Finder that has `action` called with the module `name` as soon as that is loaded, then leaves."""

    def __init__(self, role: str, name: str, action: Callable[[ModuleType], None]) -> None:
        self.castling_det_role = role
        self.name = name
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]  # duck-typed loader
                return spec
        return None


class _Loader:
    def __init__(self, loader: Any, finder: AfterLoading) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: inspect and reload look at it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.action(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)


class OperatorFallback:
    """Finder and loader of the stand-in for `mmcv._ext`."""

    role = castling_det_role = ROLES[2]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != OPERATORS_MODULE:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, origin=STAND_IN_ORIGIN)  # type: ignore[arg-type]  # duck-typed loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from castling_det.compat.stand_in import create_stand_in

        return create_stand_in(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        from castling_det.compat.stand_in import announce

        announce()
