"""Parameters and multiply-adds (MACs) of a detector at an input shape. No data set, no weights, no measurement.

One forward in eval mode tells the shapes; the numbers are closed forms of them (`closed_forms`). Two guards stand
beside them. An independent count of the matrix products and convolutions that PyTorch ran: products that no closed
form covers, such as those of an attention of an unknown type, are an error that names the module. And a watch on the
operators: one that multiplies and that no count knows (`operators`) is an error too, never a zero.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from castling_det.report.closed_forms import closed_form, uncounted
from castling_det.report.operators import Watch

__all__ = ["KINDS", "Complexity", "ModuleMacs", "count_macs", "detector_complexity"]

SCHEMA = "castling_det.complexity/2"
"""Name and version of the JSON form. A change of any field, or of what a kind means, raises the version."""

KINDS = {
    "attention_scores": "q k^T of softmax attention, k^T v of linear attention",
    "attention_values": "p v of softmax attention, q (k^T v) of linear attention, sampling of deformable attention",
    "projections": "linear layers of an attention: queries, keys, values, offsets, weights, output",
    "mlp": "linear layers of a transformer's feed-forward network",
    "conv": "convolutions outside of heads",
    "head": "convolutions and linear layers of `*_head` parts that are in no attention",
    "local_conv": "the depthwise convolution beside attention",
    "linear": "linear layers elsewhere",
}
"""What the multiply-adds of a detector are told apart by."""


@dataclass(frozen=True)
class ModuleMacs:
    """One module: its own parameters and the multiply-adds of all its calls, by kind.

    `part` is the first component of `name`: `backbone`, `neck`, `bbox_head`.
    """

    name: str
    type: str
    part: str
    params: int
    calls: int
    macs: dict[str, int]


@dataclass(frozen=True)
class Complexity:
    """A detector on one image of `input_shape` (height, width) in pixels, padded to `padded_shape` as its config says.

    `params` is a number of parameters, `macs` one of multiply-adds, `gmacs` 10^9 of them. Kinds are `KINDS`.
    """

    config: str
    input_shape: tuple[int, int]
    padded_shape: tuple[int, int]
    params: int
    macs: int
    gmacs: float
    macs_by_kind: dict[str, int]
    macs_by_part: dict[str, int]
    params_by_part: dict[str, int]
    modules: tuple[ModuleMacs, ...]


def count_macs(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[ModuleMacs, ...]:
    """Multiply-adds of `model(*inputs, **keywords)` in eval mode, a record for each module that has any.

    Raises:
        ValueError: a module without a closed form, or products outside of every closed form; names them all.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    calls: Counter[str] = Counter()
    problems: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}
    whole = {name for module, name in names.items() if closed_form(module) is not None}

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        name = names[module]
        if any(parent in whole for parent in _parents(name)):
            return
        form = closed_form(module)
        if form is not None:
            calls[name] += 1
            for kind, macs in form(module, (arguments, keywords, output)).items():
                counted[name][_kind(name, kind)] += macs
        elif (problem := uncounted(module)) is not None:
            problems[name] = problem

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {attention: _fused_attention_flops} if attention is not None else {}
    watch = Watch(names, whole)
    try:
        with (
            _evaluated(model),
            torch.no_grad(),
            watch.modules_tracked(),
            FlopCounterMode(display=False, custom_mapping=mapping) as flops,
            watch,
        ):
            model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    for name, operators in watch.problems.items():
        problems.setdefault(name, f"the operators {', '.join(sorted(operators))}")
    if problems:
        listed = "; ".join(f"{name or '(the model)'}: {problem}" for name, problem in problems.items())
        raise ValueError(
            f"no closed form for {listed}. Register one with "
            "castling_det.report.closed_forms.register_closed_form; a zero in its place would be wrong"
        )
    _check_against_trace(type(model).__name__, counted, flops.get_flop_counts(), whole)
    modules = dict(model.named_modules())
    return tuple(_record(name, modules[name], calls[name], dict(macs)) for name, macs in counted.items())


def detector_complexity(config: Any, shape: tuple[int, int], *, name: str = "") -> Complexity:
    """Parameters and multiply-adds of the detector of a config: backbone, neck and the head's forward, one image.

    Boxes are not decoded and non-maximum suppression is not run. RoI heads count the proposals of a random image.

    Args:
        config: an mmengine `Config` with `model`; weights are not loaded.
        shape: height and width of the image in pixels; padded as `data_preprocessor.pad_size_divisor` says.
        name: name of the config in the record.

    Raises:
        ValueError: see `count_macs`; a model that cannot be built; a shape that it fails on.
    """
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    if min(shape) < 1:
        raise ValueError(f"shape={shape}: expected a height and a width of at least 1 pixel")
    init_default_scope(config.get("default_scope", "mmdet"))
    try:
        model = revert_sync_batchnorm(MODELS.build(config.model))
    except Exception as error:  # Any class of any package builds here.
        raise ValueError(f"model of {name or 'the config'}: cannot be built: {error}") from error
    divisor = getattr(model.data_preprocessor, "pad_size_divisor", 1)
    padded = (math.ceil(shape[0] / divisor) * divisor, math.ceil(shape[1] / divisor) * divisor)
    size = {"img_shape": shape, "ori_shape": shape, "pad_shape": padded, "batch_input_shape": padded}
    sample = DetDataSample(metainfo={**size, "scale_factor": (1.0, 1.0), "img_id": 0})
    image = torch.randn((1, 3, *padded), generator=torch.Generator().manual_seed(0))
    try:
        modules = count_macs(model, image, [sample], mode="tensor")
    except RuntimeError as error:
        raise ValueError(f"shape={shape}: the detector fails on such an image: {error}; try a larger shape") from error
    by_kind: Counter[str] = Counter()
    by_part: Counter[str] = Counter()
    for module in modules:
        by_kind.update(module.macs)
        by_part[module.part] += sum(module.macs.values())
    total = sum(by_kind.values())
    parts = {part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()}
    return Complexity(
        config=name,
        input_shape=shape,
        padded_shape=padded,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=total,
        gmacs=total / 1e9,
        macs_by_kind=dict(by_kind),
        macs_by_part=dict(by_part),
        params_by_part={part: count for part, count in parts.items() if count},
        modules=modules,
    )


def _record(name: str, module: nn.Module, calls: int, macs: dict[str, int]) -> ModuleMacs:
    params = sum(parameter.numel() for parameter in module.parameters())
    return ModuleMacs(name, type(module).__name__, name.split(".")[0], params, calls, macs)


def _kind(name: str, kind: str) -> str:
    """A layer is told by where it stands: in a head; a linear one in an MLP, in an attention, or elsewhere."""
    components = name.split(".")
    if kind in ("conv", "linear") and components[0].endswith("_head"):
        return "head"
    if kind != "linear":
        return kind
    if {"mlp", "ffn", "ffns"} & set(components):
        return "mlp"
    return "projections" if any("attn" in component for component in components) else "linear"


def _parents(name: str) -> Iterator[str]:
    """The dotted names above `name`, the model itself (an empty name) last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _check_against_trace(
    root: str, counted: dict[str, Counter[str]], traced_flops: dict[str, dict[Any, int]], whole: set[str]
) -> None:
    """Raises if PyTorch ran more multiply-adds (2 flops each) than the closed forms say; names the inner modules."""
    closed: Counter[str] = Counter()
    for name, macs in counted.items():
        for above in {name, *_parents(name)}:
            closed[above] += sum(macs.values())
    traced = {
        name.removeprefix(root).removeprefix("."): sum(ops.values()) // 2
        for name, ops in traced_flops.items()
        if name != "Global"
    }
    if traced.get("", 0) <= closed[""]:
        return
    more = {
        name: macs - closed[name]
        for name, macs in traced.items()
        if macs > closed[name] and not any(above in whole for above in _parents(name))
    }
    inner = [name for name in more if not any(other != name and name in _parents(other) for other in more)]
    listed = ", ".join(f"{name or '(the model)'} ({more[name]} macs)" for name in sorted(inner))
    raise ValueError(
        f"matrix products that no closed form covers, in {listed}. Register one with "
        "castling_det.report.closed_forms.register_closed_form"
    )


def _fused_attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two flops a multiply-add of q k^T and p v, shapes (B, H, N, K): torch's counter leaves the CPU's kernel out."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, each module as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
