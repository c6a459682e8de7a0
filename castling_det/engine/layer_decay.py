"""Layer-wise learning-rate decay for backbones that know the depth of their parameters."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from castling_det.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor (`norm_decay_mult`, `custom_keys`, ... as there) with a rate for each layer.

    `paramwise_cfg` takes one more key, `decay_rate` in (0, 1]: the learning rate of layer i of L is multiplied by
    `decay_rate ** (L - 1 - i)`, where i and L are what the backbone's `get_layer_depth(name, prefix)` says; what is not
    of the backbone has factor 1. One group a parameter, as mmengine's own with a `paramwise_cfg`.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Adds the groups of `module` to `params`; mmengine's own calls it again for each child, with a prefix."""
        if prefix:
            super().add_params(params, module, prefix, **kwargs)
            return
        decay_rate = self.paramwise_cfg.get("decay_rate")
        if decay_rate is None or not 0 < decay_rate <= 1:
            raise ValueError(
                f"optim_wrapper.paramwise_cfg.decay_rate={decay_rate}: expected a number in (0, 1], such as 0.7"
            )
        backbone = getattr(module, "backbone", None)
        if backbone is None or not hasattr(backbone, "get_layer_depth"):
            raise ValueError(
                f"optim_wrapper.constructor: {type(module).__name__} has no backbone with get_layer_depth(); "
                "use castling_det.CastlingViT or CastlingMViT, or mmengine's DefaultOptimWrapperConstructor"
            )
        super().add_params(params, module, prefix, **kwargs)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            layer, num_layers = backbone.get_layer_depth(names[id(parameter)], "backbone.")
            group["lr"] = group.get("lr", self.base_lr) * decay_rate ** (num_layers - 1 - layer)
