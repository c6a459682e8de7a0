"""The operators that a forward ran, watched for products that no count of matrix products and convolutions sees.

PyTorch's counter takes an operator that it has no formula for as free: so it does with matrix-vector products, with
recurrent layers and with a transformer layer's fused kernel. Here each of them is named, with the module it ran in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Watch"]

# Sums of products. Those of `torch.utils.flop_counter` are not here: the trace counts them.
_PRODUCTS = frozenset({
    "dot", "vdot", "mv", "addmv", "addmv_", "addbmm", "addr", "_trilinear", "_euclidean_dist", "_cdist_forward",
    "grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "cudnn_grid_sampler",
    "_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer", "lstm", "gru", "_cudnn_rnn",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_fft_r2c", "_fft_c2r", "_fft_c2c", "_sparse_mm_reduce_impl",
    "linalg_inv_ex", "linalg_solve_triangular", "linalg_cholesky_ex", "linalg_lu_factor_ex", "_linalg_svd",
    "_linalg_eigh", "_linalg_solve_ex", "_int_mm", "_addmm_activation", "_weight_int4pack_mm", "_weight_int8pack_mm",
})  # fmt: skip

# Interpolation and selection, once an element, which count zero as modules do too.
_FREE_CUSTOM = frozenset({"torchvision.roi_align", "torchvision.roi_pool", "torchvision.nms"})

_KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler"})


class Watch(TorchDispatchMode):
    """Notes every operator with products of its own that runs outside of the modules `whole`.

    Args:
        names: name of each module of the model.
        whole: names of the modules whose closed form counts all that runs inside of them.
    """

    def __init__(self, names: Mapping[nn.Module, str], whole: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.problems: dict[str, set[str]] = {}
        """Operators by the name of the module that they ran in."""
        self._names = names
        self._whole = whole
        self._inside = [""]

    @contextmanager
    def modules_tracked(self) -> Iterator[None]:
        """Knows, while it is open, which module runs."""
        handles = []
        for module, name in self._names.items():
            handles.append(module.register_forward_pre_hook(self._entered(name)))
            handles.append(module.register_forward_hook(lambda *_: self._left()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._inside.append(name)

    def _left(self) -> None:
        self._inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _has_products(func) and not any(name in self._whole for name in self._inside[1:]):
            self.problems.setdefault(self._inside[-1], set()).add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def _has_products(func: Any) -> bool:
    """A custom operator could do anything: it is taken to multiply unless it is listed."""
    if func.namespace in _KNOWN_NAMESPACES:
        return func.overloadpacket.__name__ in _PRODUCTS
    return str(func.overloadpacket) not in _FREE_CUSTOM
