"""A hybrid checkpoint becomes a linear one: the same weights, no training state, a record of what changed."""

from __future__ import annotations

import copy
import datetime
import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import timm
import torch
from mmengine.config import Config
from torch import nn

from castling_det import __version__
from castling_det.conversion.checkpoints import Weights, load_checkpoint, safetensors_bytes
from castling_det.conversion.detectors import (
    build_detector,
    load_exactly,
    load_weights,
    own_meta,
    trained_attention,
    training_config,
    with_attention,
)
from castling_det.conversion.manifest import Drift, FileRecord, Manifest, MaskRecord
from castling_det.conversion.mask_proof import Measurement, Probes, measure, probes_of, prove, set_mask, unproven
from castling_det.engine.mask_annealing import META_KEY, attention_record
from castling_det.files import atomic_write, sha256_of
from castling_det.layers import attention_layers

__all__ = ["Job", "convert", "manifest_path"]

_DROPPED = {
    "optimizer": "state of the optimizer",
    "param_schedulers": "state of the learning-rate schedules",
    "message_hub": "logged curves",
    "state_dict": "the weights that were not taken",
    "ema_state_dict": "the weights that were not taken",
}


def convert(
    config: str | os.PathLike[str] | Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    allow_nonempty_mask: bool = False,
    weights: str = "auto",
    probe_images: Sequence[str | os.PathLike[str]] = (),
    num_probes: int = 4,
    shape: tuple[int, int] | None = None,
    command: str = "",
) -> Manifest:
    """Writes the linear-only checkpoint `out` and its manifest beside it, over older ones.

    Args:
        config: of the training (`attention="castling"`), or its deploy twin (`"linear"`).
        source: Runner checkpoint of the hybrid.
        out: `.pth` or `.safetensors` file to write; its meta says that it is converted, and `meta["cfg"]` is the deploy
            config. MMEngine's own tools read `.pth` alone.
        allow_nonempty_mask: convert although the softmax branch still contributes, or may do so.
        weights: `"auto"` (the average where EMAHook left one), `"ema"` or `"online"`.
        probe_images: real images, files or folders, to measure on; without any, noise is generated.
        num_probes: most images to measure on.
        shape: height and width in pixels of generated images; None: the test pipeline's.
        command: the command line, to be recorded.

    Raises:
        ValueError: unusable file, config or option, or a mask not known to be empty. `out` is as it was.
        OSError: `out` cannot be written, such as on a full disk. An older `out` is as it was.
    """
    job = Job.prepared(config, source, out, probe_images, num_probes, shape)
    if (modes := trained_attention(job.meta)) and "castling" not in modes:
        raise ValueError(
            f"checkpoint {source}: its meta says attention={', '.join(sorted(modes))!r}; only a detector "
            "trained with attention='castling' is converted, a linear one is deployed as it is"
        )
    hybrid_config, linear_config = with_attention(job.config, "castling"), with_attention(job.config, "linear")
    hybrid, linear = build_detector(hybrid_config), build_detector(linear_config)
    picked, notes = load_weights(hybrid, job.checkpoint, source, weights)
    load_exactly(linear, picked.tensors, source)
    state, origin = set_mask(hybrid, job.own.get("mask"), source)
    measured = measure(hybrid_config, job.probes, hybrid, linear)
    mask, more = prove(state, origin, measured)
    notes += more
    if mask.empty_by is None:
        problem = unproven(mask, measured)
        if not allow_nonempty_mask:
            raise ValueError(f"checkpoint {source}: {problem}, or accept the change with --allow-nonempty-mask")
        notes.append(f"converted with --allow-nonempty-mask: {problem}")
    done = ("converted", {"mask_empty_by": mask.empty_by})
    return job.write(linear, linear_config, picked, done, measured, mask, notes, command)


def manifest_path(out: str | os.PathLike[str]) -> Path:
    """Where the manifest of a converted checkpoint lies: beside it, with the suffix `.json`."""
    return Path(out).with_suffix(".json")


@dataclass(frozen=True)
class Job:
    """What a conversion reads, checked."""

    source: Path
    out: Path
    config: Config
    checkpoint: dict[str, Any]
    meta: dict[str, Any]
    own: dict[str, Any]
    """The records of this package in `meta`."""
    probes: Probes
    notes: list[str]

    @classmethod
    def prepared(
        cls,
        config: str | os.PathLike[str] | Config,
        source: str | os.PathLike[str],
        out: str | os.PathLike[str],
        probe_images: Sequence[str | os.PathLike[str]],
        num_probes: int,
        shape: tuple[int, int] | None,
    ) -> Job:
        """Reads config and checkpoint, before anything slow; arguments as for `convert`."""
        source, out = Path(source), Path(out)
        if out.suffix not in (".pth", ".pt", ".safetensors"):
            raise ValueError(
                f"output {out}: expected a .pth or .safetensors file; the manifest takes the same name with .json"
            )
        if out.is_dir():
            raise ValueError(f"output {out}: is a folder; give the file to write")
        if out.exists() and source.exists() and out.samefile(source):
            raise ValueError(f"output {out}: is the source, whose training state would be lost; give another name")
        training = training_config(config)
        probes, notes = probes_of(training, probe_images, num_probes, shape)
        checkpoint = load_checkpoint(source)
        meta, own = own_meta(checkpoint, source)
        if converted := own.get("converted"):
            raise ValueError(
                f"checkpoint {source}: is converted already, from the source with sha256 "
                f"{converted.get('source_sha256')}; use it as it is"
            )
        return cls(source, out, training, checkpoint, meta, own, probes, notes)

    def write(
        self,
        model: nn.Module,
        config: Config,
        picked: Weights,
        done: tuple[str, Mapping[str, Any]],
        measured: Measurement,
        mask: MaskRecord,
        notes: Sequence[str],
        command: str,
        drift_linear: dict[str, Drift] | None = None,
    ) -> Manifest:
        """Writes the checkpoint of `model` and the manifest beside it, all or nothing.

        Args:
            model, config: the detector, and its config, which becomes `meta["cfg"]`.
            picked: where its weights come from.
            done: name and content of the record of what was done, in `meta["castling_det"]`.
            measured, mask, notes, command, drift_linear: for the manifest.
        """
        digest = sha256_of(self.source)
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        origin = {"source_sha256": digest, "weights": picked.kind, "castling_det": __version__, "created": created}
        own = {**self.own, "attention": attention_record(attention_layers(model)), done[0]: {**origin, **done[1]}}
        if "cfg" in self.meta:
            own["training_cfg"] = self.meta["cfg"]
        meta = {**copy.deepcopy(self.meta), "cfg": config.pretty_text, META_KEY: own}
        if self.out.suffix == ".safetensors":
            content = safetensors_bytes(meta, model.state_dict())
        else:
            buffer = io.BytesIO()
            # Weights and meta alone, so plain that `torch.load(..., weights_only=True)` reads them.
            torch.save({"meta": meta, "state_dict": model.state_dict()}, buffer)
            content = buffer.getvalue()
        left = [str(name) for name in self.checkpoint if picked.key and name not in ("meta", picked.key)]
        dropped = {name: _DROPPED.get(name, "not needed to run the detector") for name in left} | picked.dropped
        packages = {package.__name__: str(package.__version__) for package in (torch, timm, mmengine, mmcv, mmdet)}
        manifest = Manifest(
            source=FileRecord(str(self.source), digest, self.source.stat().st_size),
            output=FileRecord(str(self.out), hashlib.sha256(content).hexdigest(), len(content)),
            config=str(self.config.filename),
            weights={"kind": picked.kind, "key": picked.key, "tensors": len(picked.tensors), "dropped": dropped},
            mask=mask,
            probes=measured.probes,
            drift=measured.drift,
            drift_linear=drift_linear,
            versions={"python": platform.python_version(), "castling_det": __version__, **packages},
            created=created,
            command=command,
            notes=(*self.notes, *notes),
        )
        text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        try:
            # Both contents are on disk before either file takes its name.
            with atomic_write(manifest_path(self.out)) as manifest_part, atomic_write(self.out) as checkpoint_part:
                manifest_part.write_text(f"{text}\n", encoding="utf-8")
                checkpoint_part.write_bytes(content)
        except OSError as error:
            message = f"output {self.out}: cannot be written ({error.strerror}); an older one is as it was"
            raise OSError(error.errno, message) from error
        return manifest
