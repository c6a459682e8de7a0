"""A hybrid checkpoint becomes a linear one: the same weights, no training state, a record of what changed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from castling_det import __version__
from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.deploy_file import meta_of, serialised, versions, weights_record
from castling_det.conversion.detectors import (
    build_detector,
    load_config,
    load_exactly,
    trained_attention,
    with_attention,
)
from castling_det.conversion.macs import macs_before_and_after
from castling_det.conversion.manifest import FileRecord, Macs, Manifest
from castling_det.conversion.mask_proof import limits, nonempty_message, prove, set_mask
from castling_det.conversion.probes import DEFAULT_SHAPE, Probes, files_to_probe, input_shape, measure
from castling_det.conversion.weights import select_weights
from castling_det.files import atomic_write, sha256_of

__all__ = ["convert", "manifest_path"]


def manifest_path(out: str | os.PathLike[str]) -> Path:
    """Where the manifest of a converted checkpoint lies: beside it, with the suffix `.json`."""
    return Path(out).with_suffix(".json")


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
        out: file to write; its meta says that it is converted, and `meta["cfg"]` is the deploy config.
        allow_nonempty_mask: convert although the softmax branch still contributes, or may do so.
        weights: `"auto"` (the average where EMAHook left one), `"ema"` or `"online"`.
        probe_images: real images, files or folders, to measure on; without any, noise is generated.
        num_probes: most images to measure on.
        shape: height and width in pixels of generated images and for the MACs; None: the test pipeline's.
        command: the command line, to be recorded.

    Raises:
        ValueError: unusable file, config or option, or a mask not known to be empty. `out` is as it was.
        OSError: `out` cannot be written, such as on a full disk. An older `out` is as it was.
    """
    source, out = Path(source), Path(out)
    _check_paths(source, out)
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes}: expected at least 1")
    trained = load_config(config)
    checkpoint = load_checkpoint(source)
    meta = meta_of(checkpoint, source)
    _check_trained_as_hybrid(trained_attention(meta), source)
    picked = select_weights(checkpoint, source, weights)
    hybrid_config, linear_config = with_attention(trained, "castling"), with_attention(trained, "linear")
    hybrid, linear = build_detector(hybrid_config), build_detector(linear_config)
    for model in (hybrid, linear):
        load_exactly(model, picked.tensors, source)
    state = set_mask(hybrid, meta, source)
    shape, shape_note = _shape(trained, shape)
    files = files_to_probe(probe_images, num_probes) if probe_images else ()
    measured = measure(hybrid_config, Probes(files, num_probes, shape), hybrid, linear)
    mask = prove(hybrid, state, measured)
    notes = [*shape_note, *limits(mask)]
    if mask.empty_by is None:
        problem = nonempty_message(mask, measured)
        if not allow_nonempty_mask:
            raise ValueError(f"checkpoint {source}: {problem}, or accept the change with --allow-nonempty-mask")
        notes.append(f"converted with --allow-nonempty-mask: {problem}")
    macs, macs_note = _macs(trained, shape)
    notes += macs_note
    digest = sha256_of(source)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = serialised(
        linear,
        linear_config,
        meta,
        {
            "source_sha256": digest,
            "weights": picked.kind,
            "mask_empty_by": mask.empty_by,
            "castling_det": __version__,
            "created": created,
        },
    )
    manifest = Manifest(
        source=FileRecord(str(source), digest, source.stat().st_size),
        output=FileRecord(str(out), hashlib.sha256(content).hexdigest(), len(content)),
        config=str(trained.filename),
        weights=weights_record(checkpoint, picked, linear),
        mask=mask,
        probes=measured.probes,
        drift=measured.drift,
        macs=macs,
        versions=versions(),
        created=created,
        command=command,
        notes=tuple(notes),
    )
    _write(out, content, manifest)
    return manifest


def _check_paths(source: Path, out: Path) -> None:
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"output {out}: expected a .pth file; the manifest takes the same name with .json")
    if out.is_dir():
        raise ValueError(f"output {out}: is a folder; give the file to write")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"output {out}: is the source, whose training state would be lost; give another name")


def _check_trained_as_hybrid(modes: set[str], source: Path) -> None:
    if modes and "castling" not in modes:
        raise ValueError(
            f"checkpoint {source}: its meta says attention={', '.join(sorted(modes))!r}; only a detector "
            "trained with attention='castling' is converted, a linear one is deployed as it is"
        )


def _shape(config: Config, shape: tuple[int, int] | None) -> tuple[tuple[int, int], list[str]]:
    if shape is not None:
        if min(shape) < 1:
            raise ValueError(f"shape={shape}: expected height and width in pixels, such as 640 640")
        return shape, []
    stated = input_shape(config)
    if stated is not None:
        return stated, []
    height, width = DEFAULT_SHAPE
    return DEFAULT_SHAPE, [f"the config states no input size: {height} x {width} pixels were taken"]


def _macs(config: Config, shape: tuple[int, int]) -> tuple[Macs | None, list[str]]:
    try:
        return macs_before_and_after(config, shape), []
    except ValueError as error:
        return None, [f"MACs are not known: {error}"]


def _write(out: Path, content: bytes, manifest: Manifest) -> None:
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        # Both contents are on disk before either file takes its name.
        with atomic_write(manifest_path(out)) as manifest_part, atomic_write(out) as checkpoint_part:
            manifest_part.write_text(text, encoding="utf-8")
            checkpoint_part.write_bytes(content)
    except OSError as error:
        message = f"output {out}: cannot be written ({error.strerror}); an older one is as it was"
        raise OSError(error.errno, message) from error
