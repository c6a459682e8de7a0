"""Checks and measures the attention on a GPU: parity, times against flash attention, memory, training iterations.

  tools/benchmarks/gpu.py --name h100        # writes results/gpu/h100.json
  tools/benchmarks/gpu.py --dry-run          # the same at tiny sizes on a CPU; writes nothing unless --out is given

Nothing is timed while a parity fails. Exit code: 0, or 1 if a parity or a case failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from castling_det.layers import MaskState, attention_layers
from castling_det.ops import linear_angular_packed, masked_softmax_packed, naive
from castling_det.ops.numerics import uses_kernels
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "castling_det.gpu/1"
MASKS = {"open": 0.0, "half": 1.0, "empty": float("inf")}
"""Thresholds in multiples of 1/N, of rows that are nearly uniform."""
BOUND = 2e-2
"""RMS of a difference in bfloat16, gradients included, over that of the reference in float64."""
FAMILIES = (
    "castling_vit/gfl_castling-vit-nano_castling_8xb16-100e_coco",
    "castling_vit/retinanet_castling-vit-s_castling_8xb2-1x_coco",
    "castling_vit/mask-rcnn_castling-vit-b_castling_8xb2-amp-lsj-100e_coco",
    "castling_vit/dino-4scale_castling-vit-s_castling_8xb2-12e_coco",
    "castling_levit/picodet_castling-levit-256_castling_8xb64-300e_coco",
    "castling_levit/rtmdet_castling-levit-384_castling_8xb32-300e_coco",
    "castling_mvit/mask-rcnn_castling-mvit-t_castling_8xb2-amp-ms-crop-36e_coco",
)


@dataclass(frozen=True)
class Sizes:
    """What is measured; tiny in a dry run."""

    tokens: tuple[int, ...] = (1024, 4096, 16384)
    parity_tokens: tuple[int, ...] = (49, 1000, 4096)
    batch: int = 4
    heads: int = 6
    channels: int = 64
    image: int = 1024
    iteration: tuple[int, int, int] = (2, 800, 1216)
    """Images, height and width of a training iteration of a detector."""
    families: tuple[str, ...] = FAMILIES
    seconds: float = 1.0


DRY = Sizes((16, 49), (16, 49), 1, 2, 16, 64, (1, 64, 96), FAMILIES[4:5], 0.0)


@dataclass(frozen=True)
class GpuRow:
    """One case. `times` is how many times as fast as `softmax`, flash attention; `memory` is over softmax's.

    `floor_share` is the time in which the memory moves inputs, outputs and their gradients once, over the case's time.
    """

    case: str
    tokens: int
    variant: str
    passes: str
    error: str | None = None
    parity_rms: float | None = None
    ms: float | None = None
    peak_mib: float | None = None
    times: float | None = None
    memory: float | None = None
    floor_share: float | None = None


@dataclass(frozen=True)
class GpuReport:
    """All rows of a run, and whether Triton's kernels computed them."""

    machine: Machine
    created_by: str
    kernels: bool
    bandwidth_gb_s: float
    rows: tuple[GpuRow, ...]


def softmax(qkv: Tensor) -> Tensor:
    """Flash attention, where torch has it, on packed tensors."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def linear(qkv: Tensor) -> Tensor:
    """The core that is deployed."""
    return linear_angular_packed(qkv)


def hybrid(multiple: float) -> Callable[[Tensor], Tensor]:
    """The core in training, as the layer calls it: without the branch once the mask is empty for certain."""

    def attend(qkv: Tensor) -> Tensor:
        state = MaskState(multiple, "uniform")
        tokens = qkv.shape[1]
        aux = None if state.is_empty(tokens) else masked_softmax_packed(qkv, state.absolute(tokens))
        return linear_angular_packed(qkv, aux=aux)

    return attend


VARIANTS = {"softmax": softmax, "linear": linear} | {f"hybrid, {name}": hybrid(at) for name, at in MASKS.items()}


def parities(sizes: Sizes, device: str) -> Iterator[GpuRow]:
    """Output and gradient of each variant in bfloat16 against its twin in float64."""
    for tokens in sizes.parity_tokens:
        qkv = torch.randn(1, tokens, 3, 2, sizes.channels, device=device).bfloat16()
        for name, function in list(VARIANTS.items())[1:]:
            threshold = MASKS.get(name.removeprefix("hybrid, "), float("inf")) / tokens

            def twin(x: Tensor, threshold: float = threshold) -> Tensor:
                q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
                aux = naive.masked_softmax(q, k, v, threshold) if threshold < 1 else None
                return naive.linear_angular_attention(q, k, v, aux=aux).transpose(1, 2)

            results = []
            for run, x in ((function, qkv), (twin, qkv.double())):
                leaf = x.detach().requires_grad_()
                out = run(leaf)
                results.append((out, *torch.autograd.grad(out, leaf, torch.ones_like(out))))
            errors = [
                float(((a.double() - b).square().mean() / b.square().mean()).sqrt().detach())
                for a, b in zip(*results, strict=True)
            ]
            yield GpuRow("parity", tokens, name, "forward and gradient", parity_rms=max(errors))


def measured(step: Callable[[], Any], seconds: float, device: str) -> tuple[float, float | None]:
    """Median milliseconds of a call, and the MiB that it allocates at most."""
    step()
    peak = None
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    timing = Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=seconds)
    return timing.median * 1e3, peak


def steps_of(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], Any]]:
    """The calls that are timed: without gradients, and with the gradient of the input."""
    leaf = x.detach().requires_grad_()
    # As wide as an output, which has the shape of the values.
    grad = torch.randn_like(function(x))

    @torch.no_grad()
    def forward() -> Tensor:
        return function(x)

    return {"forward": forward, "training step": lambda: torch.autograd.grad(function(leaf), leaf, grad)}


def cores(sizes: Sizes, device: str, bandwidth: float) -> Iterator[GpuRow]:
    """Every variant at every length."""
    for tokens in sizes.tokens:
        shape = (sizes.batch, tokens, 3, sizes.heads, sizes.channels)
        qkv = torch.randn(shape, device=device, dtype=torch.bfloat16)
        part = qkv.nbytes / 3
        # Forward reads three parts and writes one; backward reads four and writes three.
        floors = {"forward": 4 * part / bandwidth, "training step": 11 * part / bandwidth}
        for passes, floor in floors.items():
            base: tuple[float, float | None] | None = None
            for name, function in VARIANTS.items():
                ms, peak = measured(steps_of(function, qkv)[passes], sizes.seconds, device)
                base = base or (ms, peak)
                memory = peak / base[1] if peak and base[1] else None
                share = floor * 1e3 / ms
                yield GpuRow("core", tokens, name, passes, None, None, ms, peak, base[0] / ms, memory, share)


def backbones(sizes: Sizes, device: str) -> Iterator[GpuRow]:
    """ViT-S as a whole: linear against softmax."""
    from castling_det.models import CastlingViT

    image = torch.randn(1, 3, sizes.image, sizes.image, device=device)
    base = None
    for mode in ("softmax", "linear", "castling"):
        torch.manual_seed(0)
        model = CastlingViT(384, depth=12, num_heads=6, img_size=sizes.image, attention=mode).to(device)

        def step(model: Any = model) -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = sum(level.float().square().mean() for level in model(image))
            loss.backward()

        ms, peak = measured(step, sizes.seconds, device)
        base = base or (ms, peak)
        memory = peak / base[1] if peak and base[1] else None
        tokens = (sizes.image // 16) ** 2
        yield GpuRow("ViT-S", tokens, mode, "training step", None, None, ms, peak, base[0] / ms, memory)


def iterations(sizes: Sizes, device: str) -> Iterator[GpuRow]:
    """Forward, losses and backward of a detector of each COCO family on random images, the mask open."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    init_default_scope("mmdet")
    # Which a runner says, and random resizing asks for.
    MessageHub.get_current_instance().update_info("iter", 0)
    batch, height, width = sizes.iteration
    for family in sizes.families:
        name = family.split("/")[1].removesuffix("_coco")
        try:
            config = Config.fromfile(ROOT / "configs" / f"{family}.py")
            model = MODELS.build(config.model).to(device).train()
            shapes = [[3, height, width]] * batch
            data = demo_mm_inputs(batch, shapes, num_classes=80, with_mask=model.with_mask, device=device)
            data = model.data_preprocessor(data, True)
            for layer in attention_layers(model, "castling").values():
                layer.mask_state = MaskState(0.0)

            def step(model: Any = model, data: Any = data) -> None:
                with torch.autocast(device, torch.bfloat16):
                    losses = model(**data, mode="loss")
                model.parse_losses(losses)[0].backward()

            ms, peak = measured(step, sizes.seconds, device)
            yield GpuRow("iteration", height * width // 256, name, "training step", ms=ms, peak_mib=peak)
        except Exception as error:  # a family that fails is a row that says so
            traceback.print_exc()
            yield GpuRow("iteration", 0, name, "training step", error=f"{type(error).__name__}: {error}"[:200])


def bandwidth_of(device: str, mebibytes: int) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms, _ = measured(lambda: target.copy_(source), 0.2, device)
    return 2 * source.nbytes / ms * 1e3


def read_gpu(path: Path) -> GpuReport:
    """Reads the record; raises ValueError for another file."""
    return read_document(path, GpuReport, schema=SCHEMA, field="gpu", fix="run gpu.py again")


def gpu_markdown(report: GpuReport) -> str:
    """The table of docs/attention.md."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    head = ["case", "N", "variant", "pass", "ms", "times as fast", "memory", "of the floor"]
    body = []
    for row in report.rows:
        shown = f"{row.parity_rms:.1e} RMS" if row.parity_rms is not None else row.error or cell(row.ms, "{:.3f}")
        numbers = [shown, cell(row.times, "{:.2f}x"), cell(row.memory, "{:.2f}x"), cell(row.floor_share, "{:.0%}")]
        body.append([row.case, str(row.tokens), row.variant, row.passes, *numbers])
    by = "Triton's kernels" if report.kernels else "plain operations"
    said = f"By {by}, bfloat16; a copy moves {report.bandwidth_gb_s:.0f} GB/s. Machine: {report.machine}."
    return "\n".join([*markdown_table(head, body), "", said, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="gpu", help="of the record, results/gpu/NAME.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON record, elsewhere")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu.py: no GPU is at hand; --dry-run runs the same at tiny sizes on a CPU", file=sys.stderr)
        return 1
    sizes, device = (DRY, "cpu") if args.dry_run else (Sizes(), "cuda")
    torch.manual_seed(0)
    bandwidth = bandwidth_of(device, 16 if args.dry_run else 1024)
    rows = list(parities(sizes, device))
    agree = all(row.parity_rms is not None and row.parity_rms < BOUND for row in rows)
    if agree:
        rows += [*cores(sizes, device, bandwidth), *backbones(sizes, device), *iterations(sizes, device)]
    command = shlex.join(["tools/benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    kernels = uses_kernels(torch.zeros(1, device=device, dtype=torch.bfloat16))
    report = GpuReport(this_machine(), command, kernels, bandwidth / 1e9, tuple(rows))
    out = args.out or (None if args.dry_run else ROOT / "results" / "gpu" / f"{args.name}.json")
    if out is not None:
        write_document(out, report, schema=SCHEMA, field="gpu")
    print(gpu_markdown(report))
    return 0 if agree and not any(row.error for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
