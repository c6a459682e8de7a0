"""Running on MMDetection as it is installed: a check of the host, and stand-ins for absent operators.

`host` needs the standard library only; the stand-ins (`stand_in` and its parts) load with `mmcv.ops`.
"""

from castling_det.compat.host import (
    HOST_PACKAGES,
    HostPackage,
    check_host,
    host_problems,
    host_warnings,
    installed_distributions,
    mmdet_tool,
)

__all__ = [
    "HOST_PACKAGES",
    "HostPackage",
    "check_host",
    "host_problems",
    "host_warnings",
    "installed_distributions",
    "mmdet_tool",
]
