"""Properties that hold for any input: of the ops, the schedules, the converter and the checks of annotations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from castling_det.conversion import load_checkpoint, select_weights
from castling_det.conversion.detectors import own_meta
from castling_det.datasets.checks import check_annotations, check_classes
from castling_det.engine import META_KEY, SCHEDULES, mask_state
from castling_det.ops import linear_angular_attention, masked_softmax_attention
from tests.datasets.test_dataset_checks import CLASSES, sound
from tests.robustness.hostile_files import saved

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NORMALIZERS = ("l2", "kernel")

shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 17), st.integers(1, 9))
magnitudes = st.sampled_from((1e-6, 1e-3, 1.0, 50.0, 1e4))


@st.composite
def qkv(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one shape and of any size, some tokens zero."""
    shape, scale = draw(shapes), draw(magnitudes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * scale
    if draw(st.booleans()):
        tensors[:, :, :, 0] = 0
    q, k, v = tensors.to(dtype)
    return q, k, v


@QUICK
@given(inputs=qkv())
def test_the_kernel_form_is_a_convex_average_of_the_values(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = inputs
    out = linear_angular_attention(q, k, v, normalizer="kernel")
    low, high = v.amin(dim=-2, keepdim=True), v.amax(dim=-2, keepdim=True)
    slack = 1e-9 * v.abs().max()
    assert (out >= low - slack).all() and (out <= high + slack).all()


@QUICK
@given(inputs=qkv(), normalizer=st.sampled_from(NORMALIZERS))
def test_an_order_of_the_keys_changes_nothing(inputs: tuple[Tensor, Tensor, Tensor], normalizer: str) -> None:
    q, k, v = inputs
    order = torch.randperm(k.shape[-2], generator=torch.Generator().manual_seed(0))
    found = linear_angular_attention(q, k[..., order, :], v[..., order, :], normalizer=normalizer, v_at_q=v)
    expected = linear_angular_attention(q, k, v, normalizer=normalizer)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=float(1e-9 * (1 + v.abs().max())))


@QUICK
@given(inputs=qkv(), normalizer=st.sampled_from(NORMALIZERS), factor=st.floats(1e-3, 1e3))
def test_the_length_of_queries_and_keys_changes_nothing(
    inputs: tuple[Tensor, Tensor, Tensor], normalizer: str, factor: float
) -> None:
    q, k, v = inputs
    assume(float(q.abs().max()) > 1e-2)  # far above the eps of the norms
    found = linear_angular_attention(q * factor, k / factor, v, normalizer=normalizer)
    expected = linear_angular_attention(q, k, v, normalizer=normalizer)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=float(1e-4 * (1 + v.abs().max())))


@QUICK
@given(
    inputs=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)).flatmap(qkv),
    normalizer=st.sampled_from(NORMALIZERS),
)
def test_outputs_and_gradients_are_finite(inputs: tuple[Tensor, Tensor, Tensor], normalizer: str) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = linear_angular_attention(*leaves, normalizer=normalizer)
    out.float().sum().backward()
    assert out.isfinite().all()
    if inputs[0].dtype == torch.float32:
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@QUICK
@given(inputs=qkv(), threshold=st.floats(0, 1.5))
def test_the_mask_keeps_less_as_its_threshold_rises(inputs: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
    out, kept = masked_softmax_attention(*inputs, threshold)
    _, fewer = masked_softmax_attention(*inputs, threshold + 0.05)
    assert 0 <= float(fewer) <= float(kept) <= 1
    if threshold >= 1:
        assert float(kept) == 0 and not out.any()
    everything, _ = masked_softmax_attention(*inputs, 0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(everything, expected, rtol=1e-6, atol=float(1e-8 * (1 + inputs[2].abs().max())))


@QUICK
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    start=st.floats(1e-4, 1.0),
    end=st.floats(1.0, 4096.0),
    begin=st.floats(0, 0.4),
    empty_from=st.floats(0.5, 0.99),
    fade=st.booleans(),
    points=st.lists(st.floats(0, 1), min_size=2, max_size=8),
)
def test_every_schedule_only_empties_and_ends_empty(
    schedule: str, start: float, end: float, begin: float, empty_from: float, fade: bool, points: list[float]
) -> None:
    fixed: dict[str, Any] = dict(schedule=schedule, start=start, end=end, begin=begin, empty_from=empty_from, fade=fade)
    states = [mask_state(point, **fixed) for point in sorted(points)]
    for before, after in itertools.pairwise(states):
        assert after.threshold >= before.threshold * (1 - 1e-9) and after.aux_scale <= before.aux_scale + 1e-12
    assert math.isclose(mask_state(0.0, **fixed).threshold, start, rel_tol=1e-9)
    for point, state in zip(sorted(points), states, strict=True):
        assert 0 <= state.aux_scale <= 1 and not math.isnan(state.threshold)
        assert math.isinf(state.threshold) == (point >= empty_from)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(QUICK, max_examples=200)
@given(
    key=st.sampled_from(("images", "annotations", "categories")),
    field=st.sampled_from(("id", "width", "height", "file_name", "image_id", "category_id", "bbox", "area", "name")),
    value=json_values,
)
def test_any_value_in_any_field_is_sound_or_named(key: str, field: str, value: Any) -> None:
    data = sound()
    data[key][1][field] = value
    problems = check_annotations(data, classes=CLASSES)
    assert all(problem.field and problem.message and problem.fix for problem in problems)
    if field in sound()[key][1] and not isinstance(value, int | float | str | list):
        assert any(problem.severity == "error" for problem in problems)


@QUICK
@given(images=st.integers(1, 6), boxes=st.integers(1, 5), scale=st.floats(0.3, 3), shift=st.floats(-5, 5))
def test_sound_boxes_pass_and_scaled_ones_pass_or_are_named(
    images: int, boxes: int, scale: float, shift: float
) -> None:
    data = sound(images, boxes)
    assert not check_annotations(data, classes=None)
    inside = True
    for annotation in data["annotations"]:
        x, y, width, height = (value * scale for value in annotation["bbox"])
        annotation["bbox"] = [x + shift, y, width, height]
        right, bottom = x + shift + width, y + height
        inside &= x + shift >= -1 and right <= 101 and bottom <= 81 and min(width, height) >= 1
    assert (not check_annotations(data, classes=None)) == inside


names = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4)


@QUICK
@given(of_file=names, of_config=names)
def test_classes_pass_only_if_they_are_the_files(of_file: list[str], of_config: list[str]) -> None:
    assume(len(set(of_file)) == len(of_file))
    problems = check_classes(of_file, tuple(of_config))
    if of_file == of_config:
        assert problems == []
    elif len(set(of_config)) == len(of_config) and set(of_config) < set(of_file):
        assert [problem.severity for problem in problems] == ["warning"]
    else:
        assert [problem.severity for problem in problems] == ["error"]


state_dicts = st.dictionaries(
    st.text("abcdefghij.", min_size=1, max_size=12),
    st.tuples(st.sampled_from((torch.float32, torch.float16, torch.int64)), st.lists(st.integers(0, 4), max_size=3)),
    min_size=1,
    max_size=5,
)


@QUICK
@given(layout=state_dicts, wrap=st.sampled_from(("", "state_dict", "model", "teacher")), zipped=st.booleans())
def test_what_is_saved_is_read_to_the_bit(tmp_path_factory: Any, layout: Any, wrap: str, zipped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 10).to(dtype) for name, (dtype, shape) in layout.items()
    }
    path = Path(tmp_path_factory.getbasetemp(), "property.pth")
    path.write_bytes(saved({wrap: tensors} if wrap else tensors, zipped=zipped))
    found = select_weights(load_checkpoint(path), path)
    torch.testing.assert_close(found.tensors, tensors, rtol=0, atol=0)
    assert found.key == wrap and found.kind == "only"


@QUICK
@given(meta=json_values, own=json_values)
def test_any_meta_is_taken_or_refused(meta: Any, own: Any) -> None:
    for hostile in (meta, {META_KEY: own}, {META_KEY: {"converted": own}}):
        try:
            found, records = own_meta({"meta": hostile}, "x.pth")
            assert found == hostile or not isinstance(hostile, dict)
            assert isinstance(records, dict) and isinstance(records.get("converted") or {}, dict)
        except ValueError as error:
            assert "x.pth" in str(error)
