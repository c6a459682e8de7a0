"""Two import hooks, so that MMDetection's own tools find this package without an edited file.

`tools/train.py` parses its config before it imports anything of ours, and without compiled operators
`import mmdet.models` fails; so the hooks are installed when the interpreter starts, by `castling_det.pth`
in site-packages. Nothing is imported until a hook is asked for its one module.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would cost every start of the interpreter 8 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["at_interpreter_start", "install", "is_installed"]

CONFIG_MODULE = "mmengine.config.utils"
OPERATORS_MODULE = "mmcv._ext"
STAND_IN_ORIGIN = "castling_det.compat"


def install() -> None:
    """Installs both hooks, each at most once."""
    config_utils = sys.modules.get(CONFIG_MODULE)
    if config_utils is not None:
        _register_configs(config_utils)
    elif not is_installed(ConfigLookup.role):
        sys.meta_path.insert(0, ConfigLookup())
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

    The value is the module's name, not the distribution's: metadata treats the two alike, and mmengine
    falls back to importing by this name where the package does not lie in site-packages (editable installs).
    """
    config_utils.MODULE2PACKAGE.setdefault("castling_det", "castling_det")


class ConfigLookup:
    """Finder that registers the package as soon as mmengine's config module is loaded, then leaves."""

    role = castling_det_role = "config look-up"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != CONFIG_MODULE:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                spec.loader = _RegisterAfterLoading(spec.loader, self)  # type: ignore[assignment]  # duck-typed loader
                return spec
        return None


class _RegisterAfterLoading:
    def __init__(self, loader: Any, finder: ConfigLookup) -> None:
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
        _register_configs(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)


class OperatorFallback:
    """Finder and loader of the stand-in for `mmcv._ext`."""

    role = castling_det_role = "operator fallback"

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
