"""Lets MMEngine's `--launcher pytorch` start ranks on a machine without a GPU.

MMEngine sets a CUDA device before it joins the process group, whatever the backend, and so ends with `Found no NVIDIA
driver`. Where there is an accelerator, its own function runs and nothing is touched.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

__all__ = ["allow_ranks_without_gpu"]


def allow_ranks_without_gpu(dist_utils: ModuleType) -> None:
    """Wraps the launcher in `mmengine.dist.utils`, once."""
    original = getattr(dist_utils, "_init_dist_pytorch", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init_dist_pytorch(backend: str, *args: Any, **kwargs: Any) -> None:
        from mmengine.device import get_device
        from torch import distributed

        init_backend = args[0] if args else kwargs.get("init_backend", "torch")
        if get_device() != "cpu" or init_backend != "torch":
            original(backend, *args, **kwargs)
            return
        if backend == "nccl":
            raise ValueError(
                "env_cfg.dist_cfg.backend='nccl': there is no GPU that this process can use; expected 'gloo' to train "
                "on CPUs: --cfg-options env_cfg.dist_cfg.backend=gloo model_wrapper_cfg.type=MMDistributedDataParallel "
                "model_wrapper_cfg.device_ids=None sync_bn=None"
            )
        kwargs.pop("init_backend", None)
        distributed.init_process_group(backend=backend, **kwargs)

    dist_utils._init_dist_pytorch = init_dist_pytorch  # type: ignore[attr-defined]
