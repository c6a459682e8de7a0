"""A hybrid checkpoint becomes a linear one: the same weights, no training state, a record of what changed."""

from __future__ import annotations

import datetime
import hashlib
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
from castling_det.conversion.fusion import fused_config, fused_twin
from castling_det.conversion.macs import macs_before_and_after
from castling_det.conversion.manifest import FileRecord, Macs, Manifest
from castling_det.conversion.mask_proof import limits, nonempty_message, prove, set_mask
from castling_det.conversion.output import check_paths, write_with_record
from castling_det.conversion.probes import Probes, files_to_probe, measure, probe_shape
from castling_det.conversion.weights import select_weights
from castling_det.files import sha256_of

__all__ = ["convert"]


def convert(
    config: str | os.PathLike[str] | Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    allow_nonempty_mask: bool = False,
    fuse: bool = False,
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
        fuse: fold BatchNorm and layer scale into the layers before them. The config that this loads into, with
            `castling_det.FusedDetector`, is written beside `out` with the suffix `.py`.
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
    check_paths(source, out)
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
    shape, shape_note = probe_shape(trained, shape)
    files = files_to_probe(probe_images, num_probes) if probe_images else ()
    probes = Probes(files, num_probes, shape)
    measured = measure(hybrid_config, probes, hybrid, linear)
    mask = prove(hybrid, state, measured)
    notes = [*shape_note, *limits(mask)]
    if mask.empty_by is None:
        problem = nonempty_message(mask, measured)
        if not allow_nonempty_mask:
            raise ValueError(f"checkpoint {source}: {problem}, or accept the change with --allow-nonempty-mask")
        notes.append(f"converted with --allow-nonempty-mask: {problem}")
    macs, macs_note = _macs(trained, shape)
    notes += macs_note
    deployed, deploy_config, fusion = linear, linear_config, None
    if fuse:
        deployed, fusion = fused_twin(linear, probes.batches(linear_config, linear))
        deploy_config = fused_config(linear_config)
    digest = sha256_of(source)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = serialised(
        deployed,
        deploy_config,
        meta,
        {
            "source_sha256": digest,
            "weights": picked.kind,
            "mask_empty_by": mask.empty_by,
            "fused": fuse,
            "castling_det": __version__,
            "created": created,
        },
    )
    manifest = Manifest(
        source=FileRecord(str(source), digest, source.stat().st_size),
        output=FileRecord(str(out), hashlib.sha256(content).hexdigest(), len(content)),
        config=str(trained.filename),
        weights=weights_record(checkpoint, picked, deployed),
        mask=mask,
        probes=measured.probes,
        drift=measured.drift,
        macs=macs,
        versions=versions(),
        created=created,
        command=command,
        notes=tuple(notes),
        fusion=fusion,
    )
    write_with_record(out, content, manifest.to_json(), config=deploy_config.pretty_text if fuse else None)
    return manifest


def _check_trained_as_hybrid(modes: set[str], source: Path) -> None:
    if modes and "castling" not in modes:
        raise ValueError(
            f"checkpoint {source}: its meta says attention={', '.join(sorted(modes))!r}; only a detector "
            "trained with attention='castling' is converted, a linear one is deployed as it is"
        )


def _macs(config: Config, shape: tuple[int, int]) -> tuple[Macs | None, list[str]]:
    try:
        return macs_before_and_after(config, shape), []
    except ValueError as error:
        return None, [f"MACs are not known: {error}"]
