"""What happens to an image before the network, as plain numbers, and images to try an exported network with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from torch import Tensor, nn

from castling_det.runtime.preprocess import Step

if TYPE_CHECKING:
    from castling_det.export.network import DeployedDetector

__all__ = ["Normalization", "Shape", "example_images", "example_shape", "image_pipeline", "normalization"]

Shape = tuple[int, int, int]
"""Batch, height and width."""

# These load, annotate or collect; none of them changes a pixel.
_SILENT = {"LoadImageFromFile", "LoadAnnotations", "PackDetInputs"}
_LOADER_DEFAULTS = {"to_float32": False, "color_type": "color", "imdecode_backend": "cv2"}


@dataclass(frozen=True)
class Normalization:
    """`(x - mean) / std` after an exchange of the first and the last channel, and padding by zeros after that."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr_to_rgb: bool
    pad_size_divisor: int

    @property
    def pad_values(self) -> tuple[float, float, float]:
        """What becomes zero, in the channel order of the input."""
        first, second, third = self.mean
        return (third, second, first) if self.bgr_to_rgb else self.mean


def normalization(model: nn.Module) -> Normalization:
    """Reads a detector's data preprocessor; ValueError for one that does something else."""
    preprocessor: Any = model.data_preprocessor
    if float(getattr(preprocessor, "pad_value", 0)) != 0:
        raise ValueError(f"data_preprocessor.pad_value={preprocessor.pad_value}: expected 0; no other one is exported")
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(preprocessor, "_enable_normalize", False):
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    # The digits that float32 has: the numbers of the config again.
    read = {name: [float(f"{value:.7g}") for value in values] for name, values in (("mean", mean), ("std", std))}
    swap = bool(getattr(preprocessor, "_channel_conversion", False))
    unit = int(getattr(preprocessor, "pad_size_divisor", 1))
    return msgspec.convert({**read, "bgr_to_rgb": swap, "pad_size_divisor": unit}, Normalization)


def image_pipeline(config: Config) -> tuple[Step, ...]:
    """The config's test pipeline between image and network; ValueError where an exported file cannot describe it."""
    if "test_dataloader" not in config:
        raise ValueError(f"config {config.filename}: has no test_dataloader, whose pipeline prepares the images")
    transforms = []
    for step in get_test_pipeline_cfg(config):
        kind = str(step["type"]).rpartition(".")[2]
        if kind in _SILENT:
            for name, value in _LOADER_DEFAULTS.items():
                if step.get(name, value) != value:
                    raise ValueError(
                        f"config {config.filename}: test pipeline: {kind}.{name}={step[name]!r}: expected {value!r}; "
                        "an exported file reads images in no other way"
                    )
        else:
            transforms.append(_described(kind, step, config))
    return tuple(transforms)


def _described(kind: str, step: Any, config: Config) -> Step:
    values: dict[str, Any] = {}
    if kind == "Equalize" and step.get("prob", 1.0) == 1.0:
        values["type"] = kind
    elif kind == "Resize" and step.get("backend", "cv2") == "cv2":
        values = {"type": kind, "scale": (step.get("scale") or ())[::-1]}
        values |= {"keep_ratio": bool(step.get("keep_ratio")), "interpolation": step.get("interpolation", "bilinear")}
    elif kind == "Pad" and step.get("padding_mode", "constant") == "constant":
        fill = step.get("pad_val", 0)
        fill = fill.get("img", 0) if isinstance(fill, dict) else fill
        values = {"type": kind, "size": (step.get("size") or ())[::-1]}
        values["pad_values"] = fill if isinstance(fill, (list, tuple)) else [fill] * 3
    try:
        return msgspec.convert(values, Step)  # type: ignore[no-any-return]
    except (msgspec.ValidationError, TypeError) as error:
        known = "Equalize with prob=1, Resize with `scale`, and Pad with `size`, of at most 4096 pixels a side"
        problem = f"an exported file can describe {known}; use only these ({error})"
        raise ValueError(f"config {config.filename}: test pipeline: {dict(step)}: {problem}") from None


def example_shape(network: DeployedDetector) -> Shape:
    """The shape to trace with: equal sides, or sides of a single unit, would become part of the program."""
    unit = network.normalization.pad_size_divisor
    return 2, (network.min_units + 1) * unit, (network.min_units + 3) * unit


def example_images(network: DeployedDetector, shape: Shape, *, seed: int = 0) -> Tensor:
    """Random images (B, 3, H, W) for `network`, smooth with noise."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 6, 6, generator=generator) * 50 + 118
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    images = (images + torch.randn(images.shape, generator=generator) * 20).clamp(0, 255).round()
    if network.preprocessing:
        return images
    return (images - network.mean.cpu()) / network.std.cpu()
