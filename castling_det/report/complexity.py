"""Parameters and multiply-adds (MACs) of a detector at an input shape. Needs no data set and no weights."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import castling_det.ops  # noqa: F401  # registers the operators that _FORMULAS names

_UNCOUNTED = frozenset({
    "dot", "vdot", "mv", "addmv", "addmv_", "addbmm", "addr", "_trilinear", "_euclidean_dist", "_cdist_forward",
    "grid_sampler_3d", "_int_mm", "_fft_r2c", "_fft_c2r", "_fft_c2c", "mkldnn_rnn_layer", "lstm", "gru", "_cudnn_rnn",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "linalg_inv_ex", "linalg_solve_triangular", "linalg_cholesky_ex",
    "linalg_lu_factor_ex", "_linalg_svd", "_linalg_eigh", "_linalg_solve_ex",
})  # fmt: skip
"""Operators of torch that multiply and add, and that have no formula."""

_FREE = {"torchvision.roi_align", "torchvision.roi_pool", "torchvision.nms"}
"""Other libraries' operators without sums of products. All others of theirs are taken to have some."""


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """q k^T and p v of shapes (B, H, M, K), (B, H, N, K) and (B, H, N, V); torch counts 2 a multiply-add."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def _bilinear(*_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Each sampled value is a weighted sum of four neighbours."""
    return 2 * 4 * math.prod(out_shape)


def _masked_softmax(inputs: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """Of queries, keys and values, or of one packed projection, (B, N, 3, H, K)."""
    if len(inputs) > 1:
        return _attention(*inputs)
    batch, tokens, _three, heads, key_dim = inputs[0]
    return _attention(*[(batch, heads, tokens, key_dim)] * 3)


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.castling_det.masked_softmax: _masked_softmax,
    torch.ops.aten.grid_sampler_2d: _bilinear,
}
"""For operators that torch's counter would take as free."""


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward, by the module that ran them (children apart) and by kind.

    Kinds: `attention` (products of queries, keys and values), and in an attention `projections` (its linear layers) and
    `local_conv` (its convolutions); `mlp`; `head` (layers of a `*_head`); `conv` and `linear` for all others.
    """

    modules: dict[str, dict[str, int]]
    uncounted: tuple[str, ...]
    """Operators that multiply and add, and that have no formula, each with its module."""

    @property
    def macs(self) -> int:
        """All of them."""
        return sum(self.macs_by_kind.values())

    @property
    def macs_by_kind(self) -> dict[str, int]:
        """Summed over the modules."""
        return dict(sum(map(Counter, self.modules.values()), Counter[str]()))


@dataclass(frozen=True)
class Complexity(Macs):
    """A detector on one image of `input_shape` (height, width) pixels, padded to `padded_shape` as its config says."""

    config: str
    input_shape: tuple[int, int]
    padded_shape: tuple[int, int]
    params: int
    params_by_part: dict[str, int]

    @property
    def gmacs(self) -> float:
        """10^9 multiply-adds."""
        return self.macs / 1e9


class _ByModule(TorchDispatchMode):
    """Asks torch's counter before and after each operator, and adds the difference to the innermost running module."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter
        self.names = {module: name for name, module in model.named_modules()}
        self.running = [model]
        self.macs: dict[str, Counter[str]] = defaultdict(Counter)
        self.uncounted: dict[str, None] = {}  # a set that keeps its order

    def enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        macs = (self.counter.get_total_flops() - before) // 2
        name, operator = self.names[self.running[-1]], func.overloadpacket.__name__
        torchs_own = func.namespace in ("aten", "prim", "prims", "profiler")
        full_name = f"{func.namespace}.{operator}"
        if macs:
            self.macs[name][self._kind(name, operator)] += macs
        elif operator in _UNCOUNTED if torchs_own else full_name not in _FREE:
            self.uncounted[f"{full_name} in {name or 'the model'}"] = None
        return result

    def _kind(self, name: str, operator: str) -> str:
        components, innermost = name.split("."), self.running[-1]
        if any("Attention" in type(module).__name__ for module in self.running):
            if operator == "convolution":
                return "local_conv"
            # nn.MultiheadAttention runs its projections itself, all other attentions in layers of their own.
            projects = isinstance(innermost, nn.MultiheadAttention) and operator in ("mm", "addmm")
            return "projections" if projects or isinstance(innermost, nn.Linear) else "attention"
        if components[0].endswith("_head"):
            return "head"
        if operator == "convolution":
            return "conv"
        return "mlp" if {"mlp", "ffn", "ffns"} & set(components) else "linear"


def count_macs(model: nn.Module, *inputs: Any, **keywords: Any) -> Macs:
    """Multiply-adds of `model(*inputs, **keywords)` in eval mode. The mode of each module is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    by_module = _ByModule(model, counter)
    handles = [module.register_forward_pre_hook(by_module.enter) for module in training]
    handles += [module.register_forward_hook(by_module.leave) for module in training]
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, in which nothing can be counted
    try:
        with torch.no_grad(), counter, by_module:
            model.eval()(*inputs, **keywords)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    return Macs({name: dict(kinds) for name, kinds in by_module.macs.items()}, tuple(by_module.uncounted))


def detector_complexity(config: Any, shape: tuple[int, int], *, name: str = "") -> Complexity:
    """Parameters and multiply-adds of the detector of a config: backbone, neck and the head's forward, one image.

    Boxes are not decoded and suppressed. RoI heads count the proposals for a fixed random image and fixed random
    weights. `shape` is (height, width) in pixels, padded as `data_preprocessor.pad_size_divisor` says. ValueError for a
    model that cannot be built, or a shape that it fails on; `name` is the config's name in it and in the record.
    """
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    if min(shape) < 1:
        raise ValueError(f"shape={shape}: expected a height and a width of at least 1 pixel")
    init_default_scope(config.get("default_scope", "mmdet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:  # DINO changes the config that it is built from.
            model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(config.model)))
        except Exception as error:  # Any class of any package builds here.
            raise ValueError(f"model of {name or 'the config'}: cannot be built: {error}") from error
    divisor = getattr(model.data_preprocessor, "pad_size_divisor", 1)
    padded = (math.ceil(shape[0] / divisor) * divisor, math.ceil(shape[1] / divisor) * divisor)
    size = {"img_shape": shape, "ori_shape": shape, "pad_shape": padded, "batch_input_shape": padded}
    sample = DetDataSample(metainfo={**size, "scale_factor": (1.0, 1.0), "img_id": 0})
    image = torch.randn((1, 3, *padded), generator=torch.Generator().manual_seed(0))
    try:
        macs = count_macs(model, image, [sample], mode="tensor")
    except RuntimeError as error:
        raise ValueError(f"shape={shape}: the detector fails on such an image: {error}; try a larger shape") from error
    parts = {part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()}
    params = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(macs.modules, macs.uncounted, name, shape, padded, params, {k: n for k, n in parts.items() if n})
