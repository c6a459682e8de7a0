"""Deformable attention against a loop that counts as it multiplies; operators that no counter knows are errors."""

from __future__ import annotations

import math

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.report.complexity import KINDS, count_macs, detector_complexity
from tests.report.test_complexity import _by_kind, _counter_macs, _gfl

LEVELS = ((5, 7), (3, 4))


class Counter:
    """Multiplies and adds one number at a time."""

    def __init__(self) -> None:
        self.macs = 0

    def sum_of_products(self, weights: list[float], values: list[Tensor]) -> Tensor:
        """Each product of a weight and a channel is one multiply-add."""
        total = torch.zeros_like(values[0])
        for weight, value in zip(weights, values, strict=True):
            total = total + weight * value
            self.macs += value.numel()
        return total


def _sample(maps: Tensor, x: float, y: float, counter: Counter) -> Tensor:
    """Bilinear sample of a map (H, W, M) at pixel coordinates; zero outside."""
    left, top = math.floor(x), math.floor(y)
    weights, values = [], []
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weights.append((1 - abs(x - column)) * (1 - abs(y - row)))
        inside = 0 <= row < maps.shape[0] and 0 <= column < maps.shape[1]
        values.append(maps[row, column] if inside else torch.zeros(maps.shape[2], dtype=maps.dtype))
    return counter.sum_of_products(weights, values)


def _by_loops(layer: MultiScaleDeformableAttention, query: Tensor, value: Tensor, points: Tensor) -> tuple[Tensor, int]:
    """The layer's output without its residual, query (Q, C), value (V, C), points (Q, L, 2), and its multiply-adds."""
    counter = Counter()
    heads, levels, samples = layer.num_heads, layer.num_levels, layer.num_points

    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        counter.macs += len(x) * module.in_features * module.out_features
        return F.linear(x, module.weight, module.bias)

    values = linear(layer.value_proj, value).unflatten(1, (heads, -1))
    offsets = linear(layer.sampling_offsets, query).view(len(query), heads, levels, samples, 2)
    weights = linear(layer.attention_weights, query).view(len(query), heads, -1).softmax(-1)
    starts = [0, LEVELS[0][0] * LEVELS[0][1]]
    rows = []
    for q in range(len(query)):
        for h in range(heads):
            sampled = []
            for level, ((height, width), start) in enumerate(zip(LEVELS, starts, strict=True)):
                maps = values[start : start + height * width, h].unflatten(0, (height, width))
                located = offsets[q, h, level] + points[q, level] * torch.tensor([width, height])
                for x, y in located.tolist():
                    sampled.append(_sample(maps, x - 0.5, y - 0.5, counter))
            rows.append(counter.sum_of_products(weights[q, h].tolist(), sampled))
    return linear(layer.output_proj, torch.stack(rows).view(len(query), -1)), counter.macs


@pytest.mark.parametrize("batch_first", [True, False])
def test_deformable_attention_costs_what_a_loop_counts(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(
        12, num_heads=3, num_levels=2, num_points=2, batch_first=batch_first, value_proj_ratio=2.0
    ).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    tokens = sum(height * width for height, width in LEVELS)
    query, value, points = (torch.randn(5, 12), torch.randn(tokens, 12), torch.rand(5, 2, 2))
    query, value, points = query.double(), value.double(), points.double()
    expected, macs = _by_loops(layer, query, value, points)
    call = {
        "query": query.unsqueeze(0 if batch_first else 1),
        "value": value.unsqueeze(0 if batch_first else 1),
        "reference_points": points[None],
        "spatial_shapes": torch.tensor(LEVELS),
        "level_start_index": torch.tensor([0, 35]),
    }
    out = layer.eval()(**call).reshape(5, 12) - query
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    (record,) = count_macs(layer, **call)
    assert sum(record.macs.values()) == macs, "the layer and the loop agree in every output and in every product"
    assert record.macs["attention_values"] == 5 * 5 * 2 * 2 * 24
    alone = count_macs(layer, **{**call, "query": call["value"], "value": None, "reference_points": torch.rand(
        1, tokens, 2, 2, dtype=torch.float64)})  # fmt: skip
    assert _by_kind(alone)["projections"] == tokens * 12 * (24 + 3 * 12 + 24), "values are the queries without others"


class _Runs(nn.Module):
    """An operator of torch's between two known layers."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        match self.operator:
            case "mv":
                return x @ torch.ones(4)
            case "dot":
                return x[0] @ x[1]
            case "_euclidean_dist":
                return torch.cdist(x, x)
            case "_trilinear":
                return F.bilinear(x, x, torch.ones(2, 4, 4))
            case "grid_sampler_2d":
                return F.grid_sample(x[None, None], torch.zeros(1, 2, 2, 2), align_corners=False)
            case _:
                return torch.fft.fft(x).real


@pytest.mark.parametrize("operator", ["mv", "dot", "_euclidean_dist", "_trilinear", "grid_sampler_2d", "_fft_r2c"])
def test_an_operator_that_no_counter_knows_is_an_error(operator: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Runs(operator))
    x = torch.randn(30, 4)
    assert _counter_macs(model, x) == 2 * 30 * 16, "the counter takes it as free"
    with pytest.raises(ValueError, match=rf"no closed form for 1[^:]*: the operators aten\.{operator}\b"):
        count_macs(model, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_transformer_layer_is_counted_although_its_fused_kernel_would_hide_its_parts() -> None:
    layer, x = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(1, 30, 4)
    assert _counter_macs(layer, x) == 0
    assert _by_kind(count_macs(layer, x)) == {
        "projections": 30 * 4 * 16, "attention_scores": 30 * 30 * 4, "attention_values": 30 * 30 * 4,
        "linear": 2 * 30 * 4 * 8,
    }  # fmt: skip


def test_a_custom_operator_is_an_error_outside_of_a_closed_form() -> None:
    @torch.library.custom_op("castling_det_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return 2 * x

    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x)

    class Known(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return double(super().forward(x))

    with pytest.raises(ValueError, match=r"castling_det_test\.double|Doubles"):
        count_macs(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Doubles())), torch.randn(1, 2))
    assert sum(count_macs(Known(2, 2), torch.randn(1, 2))[0].macs.values()) == 4


def test_kinds_tell_the_head_from_the_rest() -> None:
    complexity = detector_complexity(_gfl("castling"), (64, 64))
    assert set(complexity.macs_by_kind) <= set(KINDS)
    assert complexity.macs_by_kind["head"] == complexity.macs_by_part["bbox_head"] > 0
    convolutions = {module.name: module.macs["conv"] for module in complexity.modules if "conv" in module.macs}
    assert not any(name.startswith("bbox_head") for name in convolutions)
    assert sum(convolutions.values()) == complexity.macs_by_kind["conv"]
