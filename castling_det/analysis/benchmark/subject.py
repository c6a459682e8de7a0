"""A module with its input and its pass: what is called, once, by every measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from castling_det.analysis.benchmark.attentions import attention_layers
from castling_det.analysis.benchmark.models import build_model, input_shape
from castling_det.analysis.benchmark.options import BenchmarkOptions, Case
from castling_det.analysis.benchmark.variants import Variant

__all__ = ["Subject", "build_subject", "tensors_of"]


class Subject:
    """Calling it runs one pass and returns the output tensors.

    Args:
        module: of one tensor, in the mode (training or eval) in which it is to run.
        x: its input.
        backward: also compute the gradients of `x` and of the parameters.
        run: what is called in the place of `module`, such as a compiled one.
        cotangents: gradients of the outputs, in their order; None draws fixed random ones at the first call.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        *,
        backward: bool,
        run: Callable[[Tensor], Any] | None = None,
        cotangents: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.module = module
        self.x = x.detach().requires_grad_(backward)
        self.backward = backward
        self.cotangents = cotangents
        self._run = module if run is None else run
        # What a layer in training mode keeps of a forward (its mask's statistics) must not be an inference tensor.
        self._without_gradients = torch.no_grad if _any_training(module) else torch.inference_mode

    def __call__(self) -> tuple[Tensor, ...]:
        """Runs the pass; gradients are added to those that are there, see `reset`."""
        if not self.backward:
            with self._without_gradients():
                return tuple(tensors_of(self._run(self.x)))
        outputs = tuple(tensors_of(self._run(self.x)))
        if self.cotangents is None:
            self.cotangents = tuple(_random(output.shape, index).to(output) for index, output in enumerate(outputs))
        # Random ones, not ones: the sum of a normalised vector is constant, and its gradient rounding alone.
        torch.autograd.backward(outputs, self.cotangents)
        return outputs

    def reset(self) -> None:
        """Drops all gradients."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)

    @property
    def observed(self) -> str | None:
        """The parameter whose gradient is compared, of the first attention layer; None if the pass uses none."""
        for name, layer in attention_layers(self.module).items():
            if layer.qkv.weight.grad is not None:
                return f"{name}.qkv.weight"
            if layer.dconv is not None:
                return f"{name}.dconv.weight"
        return None


def build_subject(case: Case, name: str, variant: Variant, options: BenchmarkOptions) -> Subject:
    """The subject of a variant in a case, on the device and in the dtype of the case."""
    module = build_model(case, name, variant, options).to(options.device, case.torch_dtype)
    backward = case.passes == "forward+backward"
    module.train(backward)
    if variant.hybrid:
        for layer in attention_layers(module).values():
            layer.train()
    x = _random(input_shape(case, name, options), 0).to(options.device, case.torch_dtype)
    return Subject(module, x, backward=backward, run=_compiled(module) if variant.compiled else None)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in their order."""
    if isinstance(output, Tensor):
        yield output
    else:
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(item)


def _any_training(module: nn.Module) -> bool:
    return any(layer.training for layer in attention_layers(module).values())


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _compiled(module: nn.Module) -> Callable[[Tensor], Any]:
    # Graphs of earlier cases count towards a limit after which torch silently runs the module uncompiled.
    torch.compiler.reset()
    compiled: Callable[[Tensor], Any] = torch.compile(module, dynamic=False)
    return compiled
