"""The module that takes the place of `mmcv._ext` where mmcv has no compiled operators.

Each function has the name and the arguments that `mmcv/ops/*.py` call it with. Every other name exists too, because
MMCV checks its names when it is imported, but raises an error when called. Among MMDetection's own detectors that
leaves out DyHead, whose offsets have another size than the output, and PISA, which needs `nms_match`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from castling_det.compat import boxes, deformable, focal, regions

__all__ = ["COMPILED_HINT", "STAND_INS", "announce", "create_stand_in"]

COMPILED_HINT = (
    "To get compiled operators: with a C++ compiler, `pip install --no-build-isolation --no-cache-dir "
    "--force-reinstall --no-deps onedl-mmcv` (10 minutes or more); on the upstream stack, "
    "`pip uninstall mmcv-lite` and install an mmcv wheel built for your torch."
)


def _no_compiler() -> str:
    return "none, castling_det stand-ins"


STAND_INS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name) for module in (boxes, regions, focal, deformable) for name in module.__all__
} | dict.fromkeys(("get_compiler_version", "get_compiling_cuda_version"), _no_compiler)
"""The operators that exist without a compiler, by MMCV's name. All others raise an error when they are called."""


def create_stand_in(name: str = "mmcv._ext") -> ModuleType:
    """The stand-in module, not yet in `sys.modules`."""
    module = ModuleType(name, __doc__)
    vars(module).update(STAND_INS, __getattr__=_refusing)
    return module


def announce() -> None:
    """One line of notice, from the main process only: not from data-loading workers or other ranks."""
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        logging.getLogger("castling_det").warning(
            "mmcv has no compiled operators: torchvision and torch stand in for nms, soft_nms, roi_align, "
            "roi_pool, sigmoid_focal_loss and the deformable operators; any other mmcv operator raises an "
            "error when it is called."
        )


def _refusing(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"The mmcv operator '{name}' needs compiled operators, castling_det has no stand-in for it. {COMPILED_HINT}"
        )

    refuse.__name__ = name
    return refuse
