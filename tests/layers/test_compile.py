"""`torch.compile(fullgraph=True)` and `torch.export` take the attention at sizes that were not traced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from castling_det.layers import CastlingAttention
from castling_det.ops import masked_softmax
from tests.compare import assert_parity
from tests.stacks import needs_torch

SIZES = ((2, 8, 12), (1, 5, 7), (3, 12, 8))
OPTIONS = (
    dict(mode="linear"),
    dict(mode="linear", normalizer="kernel"),
    dict(mode="linear", local_conv="tokens"),
    dict(mode="softmax"),
    dict(mode="castling", threshold=1.0, threshold_unit="uniform"),
    dict(mode="castling", threshold=1.0, threshold_unit="uniform", normalizer="kernel"),
)


class OnMap(nn.Module):
    """The attention on an image (B, C, H, W), as a detector's backbone calls it."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = CastlingAttention(24, 3, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, image: Tensor) -> Tensor:
        return self.attn(image.flatten(2).transpose(1, 2), tuple(image.shape[-2:]))


def image(batch, height, width):
    return torch.randn(batch, 24, height, width, generator=torch.Generator().manual_seed(height))


# aot_eager traces the backward too, and asks for no C++ compiler.
BACKENDS = [("aot_eager", OPTIONS[0]), ("aot_eager", OPTIONS[-1])]
# In training inductor 2.11 takes these, and neither `normalizer="kernel"` nor the positions of a whole ViT.
BACKENDS += [pytest.param("inductor", OPTIONS[i], marks=pytest.mark.slow) for i in (0, 3, 4)]


@pytest.mark.parametrize(("backend", "options"), BACKENDS, ids=str)
def test_compiles_into_one_graph_for_every_size(backend, options):
    module = OnMap(**options)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        results = []
        for function in (module, compiled):
            module.zero_grad()
            out = function(image(*size))
            out.square().sum().backward()
            results.append([out, *(parameter.grad.clone() for parameter in module.parameters())])
        for expected, actual in zip(*results, strict=True):
            if expected.abs().max() > 1e-4:  # the bias of the keys has a gradient of zero
                assert_parity(actual, expected, rms=1e-5, maximum=1e-4)


@needs_torch(2, 6, why="has no Dim.DYNAMIC")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exports_with_dynamic_batch_height_and_width(options):
    module = OnMap(**options).eval()
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    program = torch.export.export(module, (image(*SIZES[0]),), dynamic_shapes=(dynamic,))
    for size in SIZES[1:]:
        assert_parity(program.module()(image(*size)), module(image(*size)), rms=1e-6, maximum=1e-5)
    softmax = [node for node in program.graph.nodes if "softmax" in str(node.target) or "attention" in str(node.target)]
    assert bool(softmax) == (options["mode"] == "softmax")


@needs_torch(2, 6, why="compiles anew for every threshold")
def test_a_threshold_that_moves_stays_in_one_graph():
    """The hook moves it every iteration: a graph for each would be a compilation each."""
    module = OnMap(mode="castling")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for step in range(6):
        module.attn.mask_state = replace(module.attn.mask_state, threshold=0.01 * 1.3**step)
        assert_parity(compiled(image(*SIZES[0])), module(image(*SIZES[0])), rms=1e-6, maximum=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("threshold", [0.02, 1.0])
def test_masked_softmax_is_a_lawful_operator(threshold):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 9, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    operator = torch.ops.castling_det.masked_softmax.default
    for inputs in ([q, k, v], [packed]):
        torch.library.opcheck(operator, (inputs, torch.tensor(threshold, dtype=torch.float64), 0.5))
    # Token by token, as the packed projection: merging the heads is a view.
    assert masked_softmax(q, k, v, threshold).out.transpose(1, 2).is_contiguous()
