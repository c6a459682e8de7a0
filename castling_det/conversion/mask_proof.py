"""Whether the softmax branch of a trained detector is gone: by its mask's state, or measured on probe images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.config import input_size_of, pipeline_of
from castling_det.conversion.manifest import Drift, LayerMask, MaskRecord, ProbeRecord
from castling_det.layers import MaskState, attention_layers

__all__ = ["Measurement", "Probes", "measure", "probes_of", "prove", "set_mask", "unproven"]

_DEFAULT_SHAPE = (256, 256)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Probes:
    """Images to measure on: files, or generated noise where there are none."""

    files: tuple[Path, ...]
    number: int
    shape: tuple[int, int]
    """Height and width of generated images, in pixels."""

    def loaded(self, config: Config) -> Iterator[dict[str, Any]]:
        """Each file behind the test pipeline, as a batch of one."""
        steps = [step for step in pipeline_of(config) if "Annotations" not in str(step["type"])]
        if not steps:
            raise ValueError(f"config {config.filename}: has no test pipeline, which prepares the probe images")
        pipeline = Compose(steps)
        for index, file in enumerate(self.files):
            try:
                data = pipeline({"img_path": str(file), "img_id": index})
            except Exception as error:  # decoders and transforms fail in many ways on a file that is no image
                raise ValueError(f"probe image {file}: cannot be read ({error}); give whole images") from error
            yield pseudo_collate([data])

    def generated(self) -> Iterator[dict[str, Any]]:
        """Batches of one image of smooth noise."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.number):
            coarse = torch.randn(1, 3, 8, 8, generator=generator) * 50 + 118
            image = F.interpolate(coarse, size=self.shape, mode="bicubic")[0]
            image += torch.randn(image.shape, generator=generator) * 15
            yield {"inputs": [image.clamp(0, 255).to(torch.uint8)]}


@dataclass(frozen=True)
class Measurement:
    """What the masks kept, by layer, and the drift, by feature map: the largest of the probe images."""

    probes: ProbeRecord
    layers: dict[str, LayerMask]
    drift: dict[str, Drift]


def probes_of(
    config: Config, images: Sequence[str | os.PathLike[str]], number: int, shape: tuple[int, int] | None
) -> tuple[Probes, list[str]]:
    """At most `number` of the images in files and folders, evenly spaced; or noise of `shape`. With notes."""
    if number < 1:
        raise ValueError(f"num_probes={number}: expected at least 1")
    if shape is not None and min(shape) < 1:
        raise ValueError(f"shape={shape}: expected height and width in pixels, such as 640 640")
    files: list[Path] = []
    for path in map(Path, images):
        if not path.exists():
            raise ValueError(f"probe image {path}: no such file or folder")
        folder = sorted(path.iterdir()) if path.is_dir() else []
        files += [file for file in folder if file.suffix.lower() in _SUFFIXES] if path.is_dir() else [path]
    if images and not files:
        raise ValueError(f"probe images: none in {', '.join(map(str, images))}; expected {', '.join(_SUFFIXES)} files")
    count = min(number, len(files))
    chosen = tuple(files[index * len(files) // count] for index in range(count))
    if shape := shape or input_size_of(config):
        return Probes(chosen, number, shape), []
    height, width = _DEFAULT_SHAPE
    note = f"the config states no input size: {height} x {width} pixels were taken"
    return Probes(chosen, number, _DEFAULT_SHAPE), [note]


def set_mask(hybrid: nn.Module, recorded: Mapping[str, Any] | None, source: object) -> tuple[MaskState, str]:
    """Puts every castling layer where the training left it, with its softmax branch on.

    Returns:
        The state, and its origin: `"checkpoint"` (`recorded` by MaskAnnealingHook), or else `"config"`.
    """
    layers = attention_layers(hybrid, "castling").values()
    try:
        state = MaskState.from_meta(recorded) if recorded else next(iter(layers)).mask_state
    except ValueError as error:
        raise ValueError(f"checkpoint {source}: meta['castling_det']['mask']: {error}") from error
    for layer in layers:
        layer.mask_state, layer.eval_aux = state, True
    return state, "checkpoint" if recorded else "config"


@torch.inference_mode()
def measure(config: Config, probes: Probes, first: Any, second: Any) -> Measurement:
    """Runs two detectors on every probe image, measures the masks of the first and compares the feature maps."""
    layers = attention_layers(first, "castling")
    kept: dict[str, LayerMask] = {}
    drift: dict[str, Drift] = {}
    shapes: list[tuple[int, int]] = []
    different: list[Tensor] = []
    tokens: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: tokens.update({name: inputs[0].shape[1]}))
        for name, layer in layers.items()
    ]
    for data in probes.loaded(config) if probes.files else probes.generated():
        image, batch = data["inputs"][0], first.data_preprocessor(data, False)["inputs"]
        shapes.append((int(batch.shape[-2]), int(batch.shape[-1])))
        one_color = torch.equal(image.amax((-2, -1)), image.amin((-2, -1)))
        if not one_color and not any(torch.equal(image, other) for other in different):
            different.append(image)
        before, after = _feature_maps(first, batch), _feature_maps(second, batch)
        for name, layer in layers.items():
            assert layer.mask_stats is not None, "set_mask leaves the branch on"
            fraction, mass = map(float, layer.mask_stats)
            kept[name] = _larger(kept.get(name), LayerMask(fraction, mass, tokens[name]))
        for name, feature_map in before.items():
            drift[name] = _larger(drift.get(name), _drift(feature_map, after[name]))
    for hook in hooks:
        hook.remove()
    images = tuple(map(str, probes.files)) or tuple(f"generated {index}" for index in range(probes.number))
    record = ProbeRecord("files" if probes.files else "generated", images, tuple(shapes), len(different))
    return Measurement(record, kept, drift)


def prove(state: MaskState, origin: str, measured: Measurement) -> tuple[MaskRecord, list[str]]:
    """Why the mask is empty: by its state for any input, or on real images that differ. With notes."""
    empty_by = None
    notes = []
    if origin == "config":
        notes.append(
            "the checkpoint does not say where its mask stood (no MaskAnnealingHook): the config's threshold was taken"
        )
    if state.aux_scale == 0:
        empty_by = "aux_scale"
    elif all(state.is_empty(layer.tokens) for layer in measured.layers.values()):
        empty_by = "threshold"
        if state.threshold_unit == "uniform" and math.isfinite(state.threshold):
            notes.append(f"the mask is empty for maps of up to {math.floor(state.threshold)} tokens")
    elif measured.probes.kind == "files" and measured.probes.different > 1 and not _kept(measured):
        empty_by = "probe images"
        notes.append("nothing passed the mask on the probe images; other images may differ")
    return MaskRecord(**dataclasses.asdict(state), origin=origin, empty_by=empty_by, layers=measured.layers), notes


def unproven(mask: MaskRecord, measured: Measurement) -> str:
    """Why the mask is not known to be empty, with the drift that conversion causes."""
    number, kind = len(measured.probes.images), measured.probes.kind
    if not _kept(measured):
        why = (
            f"nothing passing on {number} generated images is no proof; give real ones with --probe-images"
            if kind == "generated"
            else f"of {number} probe images {measured.probes.different} differ and have more than one colour, which is "
            "no proof; give two or more different photographs with --probe-images"
        )
        return f"threshold {mask.threshold:g} ({mask.threshold_unit}) does not empty the mask for certain, and {why}"
    layer, kept = max(mask.layers.items(), key=lambda item: item[1].kept_fraction)
    name, drift = max(measured.drift.items(), key=lambda item: item[1].relative_rms)
    return (
        f"the mask is not empty (threshold {mask.threshold:g} {mask.threshold_unit}): {layer} keeps "
        f"{kept.kept_fraction:.3%} of the probabilities, {kept.kept_mass:.1%} of the mass, on {number} {kind} probe "
        f"images. Without the softmax branch {name} changes by {drift.relative_rms:.2%} RMS, {drift.max_abs:.3g} at "
        "most. Train on until the mask is empty"
    )


def _kept(measured: Measurement) -> bool:
    return any(layer.kept_fraction for layer in measured.layers.values())


def _feature_maps(model: Any, batch: Tensor) -> dict[str, Tensor]:
    """The maps of backbone and neck by name, such as `neck.2`."""
    outputs = model.backbone(batch)
    maps = {f"backbone.{index}": output for index, output in enumerate(outputs)}
    if getattr(model, "with_neck", False):
        maps |= {f"neck.{index}": output for index, output in enumerate(model.neck(outputs))}
    return maps


def _drift(before: Tensor, after: Tensor) -> Drift:
    difference = (after - before).double()
    scale = before.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    relative = difference.square().mean().sqrt() / scale
    return Drift(before.shape[1], float(difference.abs().max()), float(relative))


def _larger(one: Any, other: Any) -> Any:
    """Each field the larger of two records of one kind, the first of which may be None."""
    if one is None:
        return other
    return type(other)(*map(max, dataclasses.astuple(one), dataclasses.astuple(other)))
