"""The traced program: one for ONNX, torch.export and AOTInductor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from castling_det.compat.host import EXPORTING_TORCH, release
from castling_det.export.network import DeployedDetector

__all__ = ["check_torch", "example_images", "export_program"]


def check_torch() -> None:
    """Raises a ValueError that names the version where this torch cannot export detectors."""
    if release(torch.__version__) < release(EXPORTING_TORCH):
        raise ValueError(f"torch {torch.__version__} cannot export detectors; install torch >= {EXPORTING_TORCH}")


def example_images(network: DeployedDetector, shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Random images (B, 3, H, W) for `network`, smooth with noise, of `shape` (batch, height, width)."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 6, 6, generator=generator) * 50 + 118
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    images = (images + torch.randn(images.shape, generator=generator) * 20).clamp(0, 255).round()
    if network.preprocessing:
        return images
    return (images - network.mean.cpu()) / network.std.cpu()


def export_program(network: DeployedDetector, shape: tuple[int, int, int]) -> ExportedProgram:
    """Traces `network` with any batch, and any height and width that are multiples of its `pad_size_divisor`.

    Args:
        network: in eval mode.
        shape: batch, height and width to trace with, each at least twice its unit, and different ones: a size of one,
            or two equal ones, would become part of the program.

    Raises:
        ValueError: this torch, the shape, or a detector that torch.export cannot trace for any size.
    """
    check_torch()
    unit = network.normalization.pad_size_divisor
    batch, height, width = shape
    if batch < 2 or min(height, width) < 2 * unit or height == width or height % unit or width % unit:
        raise ValueError(
            f"shape={shape}: expected a batch of 2 or more, height and width different multiples of {unit} from "
            f"{2 * unit} on"
        )
    rows, columns = Dim("rows", min=1), Dim("columns", min=1)
    sizes = {0: Dim("batch", min=1), 2: unit * rows, 3: unit * columns}
    images = example_images(network, shape)
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=(sizes,), strict=False)
    except torch._dynamo.exc.UserError as error:
        raise ValueError(f"the detector's graph is not the same for all sizes: {error}") from error
