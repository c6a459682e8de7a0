"""The module that takes the place of `mmcv._ext` where mmcv has no compiled operators.

Each function has the name and the arguments that `mmcv/ops/*.py` call it with. Every other name exists
too, because mmcv checks that its names are there when it is imported, but raises an error when called.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from castling_det.compat.boxes import nms, softnms
from castling_det.compat.deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from castling_det.compat.focal import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from castling_det.compat.regions import (
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)

__all__ = ["COMPILED_HINT", "STAND_INS", "announce", "create_stand_in"]

COMPILED_HINT = (
    "To get compiled operators: with a C++ compiler, `pip install --no-build-isolation --no-cache-dir "
    "--force-reinstall --no-deps onedl-mmcv` (10 minutes or more); on the upstream stack, "
    "`pip uninstall mmcv-lite` and install an mmcv wheel built for your torch."
)


def get_compiler_version() -> str:
    return "none, castling_det stand-ins"


def get_compiling_cuda_version() -> str:
    return "none, castling_det stand-ins"


STAND_INS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        roi_pool_forward,
        roi_pool_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


def create_stand_in(name: str = "mmcv._ext") -> ModuleType:
    """The stand-in module; it is not put into `sys.modules`."""
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
            f"The mmcv operator '{name}' needs compiled operators, "
            f"castling_det has no stand-in for it. {COMPILED_HINT}"
        )

    refuse.__name__ = name
    return refuse
