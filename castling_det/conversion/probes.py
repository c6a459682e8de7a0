"""Measuring what conversion changes: mask occupancy and feature differences on probe images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.conversion.manifest import FeatureDrift, LayerMask, ProbeRecord
from castling_det.layers import MaskedAttention, attention_layers

__all__ = [
    "DEFAULT_SHAPE",
    "Measurement",
    "Probes",
    "feature_maps",
    "files_to_probe",
    "input_shape",
    "measure",
    "probe_shape",
    "worse_drift",
]

DEFAULT_SHAPE = (256, 256)
_SEED = 0
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Probes:
    """Where the probe images come from."""

    files: tuple[Path, ...]
    """Real images; empty for generated ones."""
    number: int
    shape: tuple[int, int]
    """Height and width of generated images, in pixels."""

    def batches(self, config: Config, model: nn.Module) -> Iterator[Tensor]:
        """One preprocessed batch (1, C, H, W) an image, as the detector sees it in a test."""
        for data in self._loaded(config) if self.files else self._generated():
            yield model.data_preprocessor(data, False)["inputs"]  # type: ignore[operator]

    def _loaded(self, config: Config) -> Iterator[dict[str, Any]]:
        if "test_dataloader" not in config:
            raise ValueError(
                f"config {config.filename}: has no test_dataloader, whose pipeline prepares the probe images"
            )
        steps = [step for step in get_test_pipeline_cfg(config) if "Annotations" not in str(step["type"])]
        pipeline = Compose(steps)
        for index, file in enumerate(self.files):
            try:
                data = pipeline({"img_path": str(file), "img_id": index})
            except Exception as error:  # decoders and transforms fail in many ways on a file that is no image
                raise ValueError(f"probe image {file}: cannot be read ({error}); give whole images") from error
            yield pseudo_collate([data])

    def _generated(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(_SEED)
        for _ in range(self.number):
            coarse = torch.randn(1, 3, 8, 8, generator=generator) * 50 + 118
            image = F.interpolate(coarse, size=self.shape, mode="bicubic")[0]
            image += torch.randn(image.shape, generator=generator) * 15
            yield {"inputs": [image.clamp(0, 255).to(torch.uint8)]}


@dataclass(frozen=True)
class Measurement:
    """Occupancy by layer and drift by feature map, each the worst of the probe images."""

    probes: ProbeRecord
    layers: dict[str, LayerMask]
    drift: dict[str, FeatureDrift]


def files_to_probe(paths: Sequence[str | os.PathLike[str]], number: int) -> tuple[Path, ...]:
    """At most `number` images, evenly spaced over the sorted files of the folders and files in `paths`.

    Raises:
        ValueError: a path that is not there, or no image among them.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"probe image {path}: no such file or folder")
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in found if not path.is_dir() or file.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"probe images: none in {', '.join(map(str, paths))}; expected {', '.join(_SUFFIXES)} files")
    number = min(number, len(files))
    return tuple(files[index * len(files) // number] for index in range(number))


def input_shape(config: Config) -> tuple[int, int] | None:
    """Height and width that the config's test pipeline resizes to, or None where it does not say."""
    if "test_dataloader" not in config:
        return None
    for step in get_test_pipeline_cfg(config):
        scale = step.get("scale")
        if isinstance(scale, (tuple, list)) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return int(scale[1]), int(scale[0])
    return None


def probe_shape(config: Config, shape: tuple[int, int] | None) -> tuple[tuple[int, int], list[str]]:
    """Height and width to generate images at: those given, else the test pipeline's, else a default with a note.

    Raises:
        ValueError: sides below 1.
    """
    if shape is not None:
        if min(shape) < 1:
            raise ValueError(f"shape={shape}: expected height and width in pixels, such as 640 640")
        return shape, []
    stated = input_shape(config)
    if stated is not None:
        return stated, []
    height, width = DEFAULT_SHAPE
    return DEFAULT_SHAPE, [f"the config states no input size: {height} x {width} pixels were taken"]


def measure(config: Config, probes: Probes, hybrid: nn.Module, linear: nn.Module) -> Measurement:
    """Runs both detectors on every probe image, the hybrid with its softmax branch on."""
    layers = attention_layers(hybrid, "castling")
    occupancy: dict[str, LayerMask] = {}
    drift: dict[str, FeatureDrift] = {}
    shapes: list[tuple[int, int]] = []
    tokens: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: tokens.update({name: inputs[0].shape[1]}))
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode():
            for batch in probes.batches(config, hybrid):
                shapes.append((int(batch.shape[-2]), int(batch.shape[-1])))
                before, after = feature_maps(hybrid, batch), feature_maps(linear, batch)
                for name, layer in layers.items():
                    occupancy[name] = _worse_mask(occupancy.get(name), layer, tokens[name])
                for name, feature_map in before.items():
                    drift[name] = worse_drift(drift.get(name), feature_map, after[name])
    finally:
        for hook in hooks:
            hook.remove()
    kind, seed = ("files", None) if probes.files else ("generated", _SEED)
    images = tuple(map(str, probes.files)) or tuple(f"generated {index}" for index in range(probes.number))
    return Measurement(ProbeRecord(kind, images, tuple(shapes), seed), occupancy, drift)


def feature_maps(model: Any, batch: Tensor) -> dict[str, Tensor]:
    """The maps of backbone and neck by name, such as `neck.2`."""
    outputs = model.backbone(batch)
    maps = {f"backbone.{index}": output for index, output in enumerate(outputs)}
    if getattr(model, "with_neck", False):
        maps |= {f"neck.{index}": output for index, output in enumerate(model.neck(outputs))}
    return maps


def _worse_mask(worst: LayerMask | None, layer: MaskedAttention, tokens: int) -> LayerMask:
    stats = layer.mask_stats
    assert stats is not None, "eval_aux is on, so the forward has left its statistics"
    fraction, mass = float(stats.kept_fraction), float(stats.kept_mass)
    if worst is None:
        return LayerMask(fraction, mass, tokens)
    return LayerMask(max(worst.kept_fraction, fraction), max(worst.kept_mass, mass), max(worst.tokens, tokens))


def worse_drift(worst: FeatureDrift | None, before: Tensor, after: Tensor) -> FeatureDrift:
    """The drift of one image, or `worst` in each figure where that is larger."""
    difference = (after - before).double()
    scale = before.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    max_abs = float(difference.abs().max())
    relative = float(difference.square().mean().sqrt() / scale)
    if worst is None:
        return FeatureDrift(before.shape[1], max_abs, relative)
    return FeatureDrift(before.shape[1], max(worst.max_abs, max_abs), max(worst.relative_rms, relative))
