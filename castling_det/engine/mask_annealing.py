"""The hook that makes the softmax branch vanish during training."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from castling_det.engine.schedules import SCHEDULES, MaskState, mask_state
from castling_det.layers import MaskedAttention
from castling_det.registry import HOOKS

__all__ = ["MaskAnnealingHook"]

META_KEY = "castling_det"


@HOOKS.register_module()
class MaskAnnealingHook(Hook):
    """Sets the threshold of every castling attention before each iteration, logs what the mask keeps, records it.

    The state is recomputed from `runner.iter`: a resumed run needs none of its own. From `empty_from` on the mask is
    empty for certain, so that the last part of training sees exactly the network that is deployed, and conversion is
    exact.

    Scalars, in every visualizer backend: `mask/threshold`, `mask/aux_scale` and, for each layer,
    `mask/kept_fraction/LAYER` and `mask/kept_mass/LAYER`. Checkpoints: `meta["castling_det"]["mask"]`. In distributed
    training what was kept is the mean over the ranks, whose batches count alike.

    Args:
        schedule: `"constant"` (cut off at `empty_from`), `"linear"`, `"cosine"` or `"geometric"` in the threshold.
        start: first threshold in the layers' unit; None takes the layers' own `threshold`.
        end: threshold that the ramp reaches. `threshold_unit="absolute"`: at least 1, the default. `"uniform"`: at
            least the largest number of tokens of a training image, which has no default.
        begin: progress in [0, empty_from) at which the ramp starts.
        empty_from: progress in (begin, 1) from which on the mask is empty.
        fade: also fade the branch's factor from 1 to 0 along the ramp.
        share: instead of `fade`, the share of the softmax branch in the attention up to `begin`, in (0, 1), which falls
            to 0 along the ramp. Near 1, with `threshold=0` in the backbone, `schedule="constant"` and
            `normalizer="kernel"`, training starts as the softmax layer: how a trained one becomes linear.
        interval: iterations between two logged states.
    """

    priority = "NORMAL"

    def __init__(
        self,
        *,
        schedule: str = "geometric",
        start: float | None = None,
        end: float | None = None,
        begin: float = 0.0,
        empty_from: float = 0.8,
        fade: bool = False,
        share: float | None = None,
        interval: int = 50,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
        if not 0 <= begin < empty_from:
            raise ValueError(f"begin={begin}: expected 0 <= begin < empty_from={empty_from}")
        if not empty_from < 1:
            raise ValueError(
                f"empty_from={empty_from}: the mask would not be empty before training ends, so that conversion to "
                "linear attention would change the detector; expected a progress below 1, such as 0.8"
            )
        if start is not None and not start > 0:
            raise ValueError(f"start={start}: expected a positive threshold, such as the published 0.02")
        if share is not None and (fade or not 0 < share < 1):
            raise ValueError(f"share={share}, fade={fade}: expected a share in (0, 1), such as 0.99, without fade")
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1 iteration")
        self.schedule = schedule
        self.start = start
        self.end = end
        self.begin = begin
        self.empty_from = empty_from
        self.fade = fade
        self.share = share
        self.interval = interval
        self._layers: dict[str, MaskedAttention] = {}
        self._state = MaskState(math.nan, math.nan)
        self._kept: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Finds the layers and checks the settings against them and against the length of the run."""
        self._layers = castling_layers(runner.model)
        if not self._layers:
            raise ValueError(
                "MaskAnnealingHook found no attention in mode 'castling': set model.backbone.attention='castling', "
                "or remove the hook from custom_hooks"
            )
        units = {layer.threshold_unit for layer in self._layers.values()}
        starts = {layer.threshold for layer in self._layers.values()}
        if len(units) > 1 or (self.start is None and len(starts) > 1):
            raise ValueError(f"threshold: layers differ ({sorted(starts)}, {sorted(units)}); give the hook one `start`")
        self._unit = units.pop()
        self.start = starts.pop() if self.start is None else self.start
        self.end = self._checked_end()
        if self.schedule == "geometric" and not self.start > 0:
            raise ValueError(f"start={self.start}: schedule='geometric' needs a positive threshold")
        max_iters = runner.max_iters
        if math.ceil(self.empty_from * max_iters) > max_iters - 1:
            raise ValueError(
                f"empty_from={self.empty_from}: leaves no iteration of max_iters={max_iters} with an empty mask; "
                f"expected at most {(max_iters - 1) / max_iters:.4f}, or train longer"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the mask of this iteration."""
        assert self.start is not None and self.end is not None
        self._state = mask_state(
            runner.iter / runner.max_iters,
            schedule=self.schedule,
            start=self.start,
            end=self.end,
            begin=self.begin,
            empty_from=self.empty_from,
            fade=self.fade,
            share=self.share,
        )
        for layer in self._layers.values():
            layer.threshold, layer.aux_scale = self._state

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Sends the mask's state and occupancy to the visualizer backends."""
        # Every iteration, as all ranks must: a checkpoint, which the first rank writes alone, may follow.
        self._kept = self._mean_over_ranks()
        if not self.every_n_train_iters(runner, self.interval):
            return
        scalars = {"mask/threshold": self._state.threshold, "mask/aux_scale": self._state.aux_scale}
        for name, kept in self._occupancy().items():
            scalars |= {f"mask/{quantity}/{name}": value for quantity, value in kept.items()}
        # inf is not JSON; 1 in probability means the same: nothing passes.
        scalars["mask/threshold"] = min(scalars["mask/threshold"], self._empty_threshold())
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """States in the checkpoint's meta where the mask stood."""
        checkpoint["meta"].setdefault(META_KEY, {})["mask"] = {
            "schedule": self.schedule,
            "iteration": checkpoint["meta"].get("iter", runner.iter),
            "max_iters": runner.max_iters,
            "threshold": self._state.threshold,
            "threshold_unit": self._unit,
            "aux_scale": self._state.aux_scale,
            "empty": math.isinf(self._state.threshold) or self._state.aux_scale == 0,
            "layers": self._occupancy(),
        }

    def _mean_over_ranks(self) -> dict[str, Tensor]:
        """Kept fraction and kept mass of the last iteration, (2,), by layer."""
        stats = {name: layer.mask_stats for name, layer in self._layers.items() if layer.mask_stats is not None}
        if not stats:
            return {}
        kept = torch.stack([torch.stack([layer.kept_fraction.float(), layer.kept_mass]) for layer in stats.values()])
        all_reduce(kept, op="mean")
        return dict(zip(stats, kept, strict=True))

    def _occupancy(self) -> dict[str, dict[str, float]]:
        return {
            name: {"kept_fraction": float(kept[0]), "kept_mass": float(kept[1])} for name, kept in self._kept.items()
        }

    def _empty_threshold(self) -> float:
        return 1.0 if self._unit == "absolute" else float(self.end or math.inf)

    def _checked_end(self) -> float:
        if self._unit == "absolute":
            end = 1.0 if self.end is None else self.end
            if end < 1:
                raise ValueError(
                    f"end={end}: the schedule cannot empty the mask, probabilities above {end} would pass until "
                    "empty_from; expected end >= 1 with threshold_unit='absolute'"
                )
            return end
        if self.end is None or self.end <= 1:
            raise ValueError(
                f"end={self.end}: with threshold_unit='uniform' the threshold counts multiples of 1/N, so only "
                "end >= N empties the mask; give the largest number of tokens of a training image, "
                "(height / stride) * (width / stride)"
            )
        return self.end


def castling_layers(model: nn.Module) -> dict[str, MaskedAttention]:
    """The attention layers in mode `"castling"`, by block (`blocks.3`), of a model that may be wrapped for DDP."""
    unwrapped: nn.Module = model.module if is_model_wrapper(model) else model  # type: ignore[assignment]
    backbone: nn.Module = getattr(unwrapped, "backbone", unwrapped)
    return {
        name.removesuffix(".attn"): module
        for name, module in backbone.named_modules()
        if isinstance(module, MaskedAttention) and module.mode == "castling"
    }
