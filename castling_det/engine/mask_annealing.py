"""The schedules of the mask, pure functions of training progress, and the hook that applies them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from castling_det.layers import MaskedAttention, MaskState, attention_layers
from castling_det.registry import HOOKS

__all__ = ["META_KEY", "SCHEDULES", "MaskAnnealingHook", "attention_record", "mask_state"]

META_KEY = "castling_det"
"""Key in a checkpoint's meta under which this package writes its records."""

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda ramp, start, end: start,
    "linear": lambda ramp, start, end: start + ramp * (end - start),
    "cosine": lambda ramp, start, end: end + (start - end) * (1 + math.cos(math.pi * ramp)) / 2,
    "geometric": lambda ramp, start, end: math.exp((1 - ramp) * math.log(start) + ramp * math.log(end)),
}
"""Name to f(ramp, start, end), with ramp in [0, 1]; f(0) is `start`, and f(1) is `end` except for "constant"."""


def mask_state(
    progress: float,
    *,
    schedule: str,
    start: float,
    end: float | None,
    threshold_unit: str = "absolute",
    begin: float = 0.0,
    empty_from: float = 0.8,
    fade: bool = False,
    share: float | None = None,
) -> MaskState:
    """The mask at one point of training; its threshold is inf once the mask is to be empty.

    Args:
        progress: iterations done over all iterations, in [0, 1].
        schedule: a key of `SCHEDULES`.
        start: threshold up to `begin`.
        end: threshold that the ramp reaches at `empty_from`. None: a probability of 1, to which each layer ramps from
            `start` in the logarithm of the probability.
        threshold_unit: unit of both thresholds.
        begin: progress at which the ramp starts.
        empty_from: progress from which on the mask is empty for any input.
        fade: also fade the branch's factor from 1 to 0 along the ramp.
        share: instead of `fade`, the weight in (0, 1) of an unmasked branch in the average of both branches, up to
            `begin`; it falls linearly to 0 along the ramp. The factor f gives the branch the weight f / (1 + f).
    """
    if progress >= empty_from:
        return MaskState(math.inf, threshold_unit, 1.0 if share is None and not fade else 0.0)
    ramp = max(0.0, (progress - begin) / (empty_from - begin))
    aux_scale = 1.0 - ramp if fade else 1.0
    if share is not None:
        weight = share * (1.0 - ramp)
        aux_scale = weight / (1.0 - weight)
    if end is None:
        return MaskState(start, threshold_unit, aux_scale, 0.0 if schedule == "constant" else ramp)
    return MaskState(SCHEDULES[schedule](ramp, start, end), threshold_unit, aux_scale)


@HOOKS.register_module()
class MaskAnnealingHook(Hook):
    """Sets the mask of every castling attention before each iteration, logs how much it keeps and records it.

    The state follows from `runner.iter` alone, so a resumed run needs no state of the hook. From `empty_from` on the
    mask is empty for any input: the last part of training sees exactly the network that is deployed, and conversion is
    exact.

    Scalars, in every visualizer backend: `mask/threshold` (`mask/ramp` where each layer ramps on its own way),
    `mask/aux_scale` and, for each layer, `mask/kept_fraction/LAYER` and `mask/kept_mass/LAYER`. Checkpoints:
    `meta["castling_det"]["mask"]`, the fields of `MaskState` among others. In distributed training, kept fraction and
    mass are means over the ranks.

    Args:
        schedule: `"constant"` (cut off at `empty_from`), `"linear"`, `"cosine"` or `"geometric"` in the threshold.
        start: first threshold in the layers' unit; None takes the layers' own `threshold`.
        end: threshold that the ramp reaches. `threshold_unit="absolute"`: at least 1, the default. `"uniform"`: None
            lets each layer ramp from start / N to a probability of 1 in the logarithm of the probability, N being its
            own number of keys at any resolution. The schedules `"linear"` and `"cosine"` need a number, at least the
            largest number of tokens of a training image; older configs give it to `"geometric"` too.
        begin: progress in [0, empty_from) at which the ramp starts.
        empty_from: progress in (begin, 1) from which on the mask is empty.
        fade: also fade the branch's factor from 1 to 0 along the ramp.
        share: instead of `fade`, the weight of the softmax branch in the attention up to `begin`, in (0, 1), which
            falls to 0 along the ramp. Near 1, with `threshold=0` in the backbone, `schedule="constant"` and
            `normalizer="kernel"`, training starts as the softmax layer: this turns a trained softmax model linear.
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
        self._kept: dict[str, Tensor] = {}
        self._resumed_from: dict[str, Any] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Remembers where the mask stood when the training that is resumed was saved."""
        if runner._resume:
            self._resumed_from = ((checkpoint.get("meta") or {}).get(META_KEY) or {}).get("mask") or {}

    def before_train(self, runner: Runner) -> None:
        """Finds the layers and checks the settings against them and against the length of the run."""
        self._layers = attention_layers(runner.model, "castling")
        if not self._layers:
            raise ValueError(
                "MaskAnnealingHook found no attention in mode 'castling': set model.backbone.attention='castling', "
                "or remove the hook from custom_hooks"
            )
        max_iters = runner.max_iters
        if math.ceil(self.empty_from * max_iters) > max_iters - 1:
            raise ValueError(
                f"empty_from={self.empty_from}: leaves no iteration of max_iters={max_iters} with an empty mask; "
                f"expected at most {(max_iters - 1) / max_iters:.4f}, or train longer"
            )
        start, unit = self._start_and_unit(self._layers.values())
        end = self._checked_end(unit)
        self._state_at = partial(
            mask_state,
            schedule=self.schedule,
            start=start,
            end=end,
            threshold_unit=unit,
            begin=self.begin,
            empty_from=self.empty_from,
            fade=self.fade,
            share=self.share,
        )
        self._state = self._state_at(runner.iter / max_iters)
        before = self._resumed_from
        now = self._state
        if (before.get("threshold", 0), before.get("ramp", 0)) > (now.threshold, now.ramp):
            runner.logger.warning(
                "MaskAnnealingHook: the mask opens again. The checkpoint was saved at threshold "
                f"{MaskState.from_meta(before)} of max_iters={before.get('max_iters')}; at this iteration of "
                f"max_iters={max_iters} the schedule says {now}. The schedule spans max_iters: "
                "resume with the value of before, or train on with attention='linear' and load_from"
            )
        # An infinite threshold is not JSON: this finite one empties the mask too.
        self._largest_logged = 1.0 if unit == "absolute" else end
        if unit == "uniform" and end is not None and self.schedule == "geometric":
            runner.logger.info(
                f"MaskAnnealingHook: end={end} is not needed any more: without it each layer ramps from start / N to a "
                "probability of 1, whatever its number of keys N"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the mask of this iteration."""
        self._state = self._state_at(runner.iter / runner.max_iters)
        for layer in self._layers.values():
            layer.mask_state = self._state

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Sends the mask's state and occupancy to the visualizer backends."""
        # In every iteration, because all ranks must take part and only the first one knows whether it saves next.
        self._kept = self._mean_over_ranks()
        if not self.every_n_train_iters(runner, self.interval):
            return
        scalars = {"mask/aux_scale": self._state.aux_scale}
        if self._largest_logged is None:
            scalars["mask/ramp"] = 1.0 if math.isinf(self._state.threshold) else self._state.ramp
        else:
            scalars["mask/threshold"] = min(self._state.threshold, self._largest_logged)
        for name, kept in self._occupancy().items():
            scalars |= {f"mask/{quantity}/{name}": value for quantity, value in kept.items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Writes the state of the mask and the options of the attention into the checkpoint's meta."""
        own = checkpoint["meta"].setdefault(META_KEY, {})
        own["attention"] = attention_record(self._layers)
        own["mask"] = {
            **dataclasses.asdict(self._state),
            "schedule": self.schedule,
            "iteration": checkpoint["meta"].get("iter", runner.iter),
            "max_iters": runner.max_iters,
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

    def _start_and_unit(self, layers: Iterable[MaskedAttention]) -> tuple[float, str]:
        options = [layer.options for layer in layers]
        starts, units = {own.threshold for own in options}, {own.threshold_unit for own in options}
        if len(units) > 1 or (self.start is None and len(starts) > 1):
            raise ValueError(f"threshold: layers differ ({sorted(starts)}, {sorted(units)}); give the hook one `start`")
        start = starts.pop() if self.start is None else self.start
        if self.schedule == "geometric" and not start > 0:
            raise ValueError(f"start={start}: schedule='geometric' needs a positive threshold")
        return start, units.pop()

    def _checked_end(self, unit: str) -> float | None:
        if unit == "absolute":
            end = 1.0 if self.end is None else self.end
            if end < 1:
                raise ValueError(
                    f"end={end}: the schedule cannot empty the mask, probabilities above {end} would pass until "
                    "empty_from; expected end >= 1 with threshold_unit='absolute'"
                )
            return end
        if self.end is None and self.schedule in ("geometric", "constant"):
            return None
        if self.end is None or self.end <= 1:
            raise ValueError(
                f"end={self.end}: with threshold_unit='uniform' the threshold counts multiples of 1/N, so only "
                "end >= N empties the mask; take schedule='geometric', which needs no end, or give the largest number "
                "of tokens of a training image, (height / stride) * (width / stride)"
            )
        return self.end


def attention_record(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options and heads of attention layers, by name, as a checkpoint's meta keeps them."""
    return {name: {**dataclasses.asdict(layer.options), "num_heads": layer.num_heads} for name, layer in layers.items()}
