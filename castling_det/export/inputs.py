"""What happens to an image before the network: the config's test pipeline and data preprocessor, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from torch import nn

__all__ = ["ImagePipeline", "Normalization", "image_pipeline", "normalization"]

# These load, annotate or collect; none of them changes a pixel.
_SILENT = {"LoadImageFromFile", "LoadAnnotations", "PackDetInputs"}
_LOADER_DEFAULTS = {"to_float32": False, "color_type": "color", "imdecode_backend": "cv2"}


@dataclass(frozen=True)
class Normalization:
    """`(x - mean) / std` after an exchange of the first and the last channel, and padding by zeros after that."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr_to_rgb: bool
    pad_size_divisor: int

    @property
    def pad_values(self) -> tuple[float, ...]:
        """What becomes zero, in the channel order of the input."""
        return self.mean[::-1] if self.bgr_to_rgb else self.mean


@dataclass(frozen=True)
class ImagePipeline:
    """The transforms between a decoded image and the network's input."""

    transforms: tuple[dict[str, Any], ...]
    input_size: tuple[int, int] | None
    """Height and width of the resize, in pixels; None where there is none."""
    keep_ratio: bool


def normalization(model: nn.Module) -> Normalization:
    """That of a detector's data preprocessor.

    Raises:
        ValueError: a preprocessor that does something else.
    """
    preprocessor: Any = model.data_preprocessor
    if float(getattr(preprocessor, "pad_value", 0)) != 0:
        raise ValueError(
            f"data_preprocessor.pad_value={preprocessor.pad_value}: expected 0; an exported file has no other padding"
        )
    channels = 3
    # The digits that float32 has: the numbers of the config again.
    mean, std = [0.0] * channels, [1.0] * channels
    if getattr(preprocessor, "_enable_normalize", False):
        mean, std = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    return Normalization(
        tuple(float(f"{value:.7g}") for value in mean),
        tuple(float(f"{value:.7g}") for value in std),
        bool(getattr(preprocessor, "_channel_conversion", False)),
        int(getattr(preprocessor, "pad_size_divisor", 1)),
    )


def image_pipeline(config: Config) -> ImagePipeline:
    """The config's test pipeline.

    Raises:
        ValueError: none in the config, or a transform or an option that an exported file cannot describe.
    """
    if "test_dataloader" not in config:
        raise ValueError(f"config {config.filename}: has no test_dataloader, whose pipeline prepares the images")
    transforms = []
    size, keep_ratio = None, False
    for step in get_test_pipeline_cfg(config):
        kind = str(step["type"]).rpartition(".")[2]
        if kind in _SILENT:
            _check_loader(step, config)
            continue
        transform = _described(kind, step, config)
        if kind == "Resize":
            size, keep_ratio = tuple(transform["scale"]), transform["keep_ratio"]
        transforms.append(transform)
    return ImagePipeline(tuple(transforms), size, keep_ratio)


def _check_loader(step: Any, config: Config) -> None:
    for name, value in _LOADER_DEFAULTS.items():
        if step.get(name, value) != value:
            raise ValueError(
                f"config {config.filename}: test pipeline: {step['type']}.{name}={step[name]!r}: expected {value!r}; "
                "an exported file reads images in no other way"
            )


def _described(kind: str, step: Any, config: Config) -> dict[str, Any]:
    if kind == "Equalize" and step.get("prob", 1.0) == 1.0:
        return {"type": kind}
    if kind == "Resize" and len(step.get("scale") or ()) == 2 and step.get("backend", "cv2") == "cv2":
        width, height = step["scale"]
        return {
            "type": kind,
            "scale": [int(height), int(width)],
            "keep_ratio": bool(step.get("keep_ratio", False)),
            "interpolation": step.get("interpolation", "bilinear"),
        }
    if kind == "Pad" and step.get("size") and step.get("padding_mode", "constant") == "constant":
        width, height = step["size"]
        values = step.get("pad_val", 0)
        values = values.get("img", 0) if isinstance(values, dict) else values
        values = list(values) if isinstance(values, (list, tuple)) else [values] * 3
        return {"type": kind, "size": [int(height), int(width)], "pad_values": [float(value) for value in values]}
    raise ValueError(
        f"config {config.filename}: test pipeline: {dict(step)}: an exported file can describe Equalize with prob=1, "
        "Resize with `scale`, and Pad with `size`; export with a test pipeline of these"
    )
