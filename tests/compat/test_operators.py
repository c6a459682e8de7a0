"""What the recorded cases do not cover: gradients, oracles written from the kernels, types, refusals."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import mmcv
import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

import castling_det  # noqa: F401  # lets the stand-ins take the place of absent operators, before mmcv.ops
from castling_det.compat.stand_in import STAND_INS, create_stand_in

from mmcv.ops import (  # isort: skip
    SigmoidFocalLoss,
    deform_conv2d,
    modulated_deform_conv2d,
    nms,
    roi_align,
    roi_pool,
    sigmoid_focal_loss,
    soft_nms,
)
from mmcv.ops.multi_scale_deform_attn import (  # isort: skip
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def operator_calls() -> list[tuple[str, int, tuple[str, ...]]]:
    """Name, number of positional arguments and keywords of each call of an operator in `mmcv/ops`."""
    calls = []
    for path in sorted(Path(mmcv.__file__).parent.joinpath("ops").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "ext_module":
                    keywords = [keyword.arg for keyword in node.keywords]
                    if None not in keywords:  # a call with ** is for another framework
                        calls.append((node.func.attr, len(node.args), tuple(map(str, keywords))))
    return calls


def test_stand_ins_accept_the_calls_that_mmcv_makes() -> None:
    called = set()
    for name, positional, keywords in operator_calls():
        if name in STAND_INS:
            called.add(name)
            inspect.signature(STAND_INS[name]).bind(*[None] * positional, **dict.fromkeys(keywords))
    assert called == set(STAND_INS)


def test_other_operators_exist_and_refuse_by_name() -> None:
    stand_in = create_stand_in()
    others = {name for name, _, _ in operator_calls()} - set(STAND_INS)
    assert len(others) > 50
    for name in others:
        with pytest.raises(RuntimeError, match=rf"'{name}' needs compiled operators.*To get compiled operators"):
            getattr(stand_in, name)(1, key=2)
    with pytest.raises(AttributeError):
        _ = stand_in.__no_such_protocol__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nms_takes_every_type_and_no_boxes(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0, 0, 8, 8], [1, 0, 8, 8], [16, 0, 24, 8]], dtype=dtype)
    scores = torch.tensor([0.5, 0.75, 0.25])
    dets, keep = nms(boxes, scores.to(dtype), 0.5)
    assert keep.tolist() == [1, 2] and dets.dtype == dtype
    assert nms(boxes, scores, 0.5)[1].tolist() == [1, 2], "scores may have a type of their own"
    dets, keep = nms(boxes[:0], scores[:0].to(dtype), 0.5)
    assert dets.shape == (0, 5) and keep.shape == (0,) and keep.dtype == torch.int64


def test_soft_nms_at_its_edges() -> None:
    empty = torch.zeros(0, 4)
    assert soft_nms(empty, torch.zeros(0))[1].shape == (0,)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [5.0, 5, 5, 5], [5.0, 5, 5, 5]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    dets, keep = soft_nms(boxes, scores, iou_threshold=0.3, method="linear", min_score=1e-3)
    # 0.8 * (1 - 0.5) by the first box; the two empty boxes overlap with nothing, not even each other.
    assert keep.tolist() == [0, 2, 3, 1]
    assert_close(dets[:, 4], torch.tensor([0.9, 0.7, 0.6, 0.4]))
    assert soft_nms(boxes, scores, iou_threshold=0.3, method="naive", min_score=1e-3)[1].tolist() == [0, 2, 3]
    # With a width of x2 - x1 + 1 the overlap is 66 / 121.
    dets, keep = soft_nms(boxes[:2], scores[:2], method="linear", offset=1)
    assert_close(dets[1, 4], torch.tensor(0.8 * (1 - 66 / 121)))


@pytest.mark.parametrize("gamma", [2.0, 0.5, 0.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss_equals_torchvisions(gamma: float, reduction: str) -> None:
    logits = (torch.randn(11, 4, dtype=torch.float64) * 3).requires_grad_()
    target = torch.randint(0, 5, (11,))  # 4 is background
    assert (target == 4).any() and (target < 4).any()
    one_hot = torch.nn.functional.one_hot(target, 5)[:, :4].double()
    expected = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha=0.3, gamma=gamma)
    expected = {"none": expected, "mean": expected.sum() / 11, "sum": expected.sum()}[reduction]
    upstream = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    actual = sigmoid_focal_loss(logits, target, gamma, 0.3, None, reduction)
    (gradient,) = torch.autograd.grad(actual, logits, upstream)
    assert_close(actual, expected)
    assert_close(gradient, expected_gradient)
    with pytest.raises(AssertionError):
        assert_close(sigmoid_focal_loss(logits, target, gamma, 0.4, None, reduction), expected)


def test_sigmoid_focal_loss_weights_classes_and_stays_finite() -> None:
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0], [90.0, 90.0]], requires_grad=True)
    target = torch.tensor([1, 0, 2])
    plain = sigmoid_focal_loss(logits, target, 0.5, 0.25, None, "none")
    weighted = SigmoidFocalLoss(0.5, 0.25, torch.tensor([2.0, 3.0]), "none")(logits, target)
    assert_close(weighted, plain * torch.tensor([[3.0], [2.0], [1.0]]))
    weighted.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and torch.isfinite(plain).all()


def naive_roi_pool(features: Tensor, rois: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """mmcv's CUDA kernel, a cell at a time; differentiable."""
    channels = features.shape[1]
    rows = []
    for batch, x1, y1, x2, y2 in rois.tolist():
        starts, ends = (x1 * scale, y1 * scale), ((x2 + 1) * scale, (y2 + 1) * scale)
        steps = [(end - start) / bins for start, end, bins in zip(starts, ends, size[::-1], strict=True)]
        for y in range(size[0]):
            for x in range(size[1]):
                left, top = (math.floor(i * s + o) for i, s, o in zip((x, y), steps, starts, strict=True))
                right, bottom = (math.ceil((i + 1) * s + o) for i, s, o in zip((x, y), steps, starts, strict=True))
                cells = features[int(batch), :, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
                empty = cells.numel() == 0 or min(steps) <= 0
                rows.append(features.new_zeros(channels) if empty else cells.amax(dim=(1, 2)))
    return torch.stack(rows).view(len(rois), *size, channels).permute(0, 3, 1, 2)


def test_roi_pool_equals_the_kernels_definition() -> None:
    features = torch.randn(2, 3, 9, 11, requires_grad=True)
    corners = torch.rand(12, 2) * 50 - 5
    rois = torch.cat([torch.randint(0, 2, (12, 1)), corners, corners + torch.rand(12, 2) * 40], dim=1)
    rois[0, 3:] = rois[0, 1:3] - 9  # malformed: it ends before it starts
    rois[1, 1:] = torch.tensor([200.0, 200.0, 220.0, 220.0])  # outside of the map
    expected = naive_roi_pool(features, rois, (3, 2), 0.21)
    upstream = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, features, upstream)
    actual = roi_pool(features, rois, (3, 2), 0.21)
    (gradient,) = torch.autograd.grad(actual, features, upstream)
    assert_close(actual, expected)
    assert_close(gradient, expected_gradient)
    torchvisions = torchvision.ops.roi_pool(features, rois, (3, 2), 0.21)
    assert (torchvisions - expected).abs().max() > 0.1, "torchvision's rounds the corners, so it is no stand-in"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_roi_align_in_other_types(dtype: torch.dtype) -> None:
    features, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0.0, 4.0, 4.0, 28.0, 20.0]])
    expected = roi_align(features.to(dtype).float(), rois, (2, 2), 0.25, 2, "avg", True)
    half = features.to(dtype).requires_grad_()
    actual = roi_align(half, rois.to(dtype), (2, 2), 0.25, 2, "avg", True)
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
    actual.sum().backward()
    assert half.grad is not None and half.grad.dtype == dtype and half.grad.abs().sum() > 0


def test_roi_align_without_rois_and_with_a_maximum() -> None:
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    output = roi_align(features, torch.zeros(0, 5), (2, 3), 0.25, 2, "avg", True)
    assert output.shape == (0, 2, 2, 3)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="pool_mode='max' needs mmcv's compiled operators"):
        roi_align(features, torch.zeros(1, 5), (2, 3), 0.25, 2, "max", True)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_of_deformable_convolutions(modulated: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    # Stride, padding and dilation differ by axis; two groups, two deformable groups, two images.
    x, weight, bias = leaf(2, 4, 5, 7), leaf(6, 2, 3, 2), leaf(6)
    offset, mask = leaf(2, 2 * 2 * 6, 3, 8), leaf(2, 2 * 6, 3, 8)
    geometry = ((2, 1), (1, 1), (1, 1), 2, 2)
    if modulated:
        inputs, convolve = (x, offset, mask, weight, bias), modulated_deform_conv2d
    else:
        inputs, convolve = (x, offset, weight), deform_conv2d
    assert torch.autograd.gradcheck(lambda *tensors: convolve(*tensors, *geometry), inputs, fast_mode=True)


def test_deformable_attention() -> None:
    shapes = torch.tensor([[3, 4], [2, 2]])
    value = torch.randn(2, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, 5, 2, 2, 2, 2, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 5, 2, 2, 2, dtype=torch.float64).requires_grad_()

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        starts = torch.tensor([0, 12])
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    assert_close(
        attend(value, locations, weights),
        multi_scale_deformable_attn_pytorch(value, shapes, locations, weights),
    )
    assert torch.autograd.gradcheck(attend, (value, locations, weights))


def modulated_oracle(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """3 x 3, padding 1, one group, a sample at a time; samples at or beyond -1 or the far side are zero, as in MMCV."""
    (height, width), rows = x.shape[-2:], []
    for y in range(height):
        for x0 in range(width):
            taps = []
            for tap in range(9):
                sample_y = y - 1 + tap // 3 + offset[0, 2 * tap, y, x0]
                sample_x = x0 - 1 + tap % 3 + offset[0, 2 * tap + 1, y, x0]
                value = x.new_zeros(x.shape[1])
                if -1 < sample_y < height and -1 < sample_x < width:
                    for near_y in (sample_y.floor(), sample_y.floor() + 1):
                        for near_x in (sample_x.floor(), sample_x.floor() + 1):
                            if 0 <= near_y < height and 0 <= near_x < width:
                                away_y, away_x = (sample_y - int(near_y)).abs(), (sample_x - int(near_x)).abs()
                                share = (1 - away_y) * (1 - away_x)
                                value = value + share * x[0, :, int(near_y), int(near_x)]
                taps.append(value * mask[0, tap, y, x0])
            rows.append((weight.flatten(2) * torch.stack(taps, dim=-1)).sum(dim=(1, 2)))
    return torch.stack(rows, dim=-1).view(1, -1, height, width)


@pytest.mark.parametrize("offsets", ["zero", "random"])
def test_gradients_of_the_deformable_convolution_at_the_padding(offsets: str) -> None:
    """Zero offsets put the first samples of a padded convolution at exactly -1: zero, and without a gradient."""
    x, weight = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    offset = torch.randn(1, 18, 4, 5, dtype=torch.float64) * (offsets == "random")
    mask = torch.rand(1, 9, 4, 5, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, offset, mask, weight)]
    expected = modulated_oracle(*leaves)
    actual = modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)
    upstream = torch.randn_like(expected)
    assert_close(actual, expected)
    gradients = (torch.autograd.grad(out, leaves, upstream) for out in (actual, expected))
    for index, (gradient, wanted) in enumerate(zip(*gradients, strict=True)):
        if not (offsets == "zero" and index == 1):
            assert_close(gradient, wanted)
            continue
        # On whole cells a bilinear sample has a kink, and each side's slope is right: compare where there is no choice.
        at_minus_one = torch.zeros(9, 2, 4, 5, dtype=torch.bool)
        at_minus_one[:3, :, 0], at_minus_one[::3, :, :, 0] = True, True
        assert not gradient.view(9, 2, 4, 5)[at_minus_one].any()


def test_offsets_that_are_not_finite_sample_nothing() -> None:
    x, weight = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 3, 3)
    offset = torch.full((1, 18, 4, 5), math.nan)
    offset[:, 4:] = math.inf
    out = deform_conv2d(x, offset, weight, 1, 1)
    assert not out.any()
    out.sum().backward()
    assert x.grad is not None and not x.grad.any()
