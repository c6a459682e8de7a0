"""Multiply-adds against hand-derived numbers, torch's own counter on unfused attention, and the figures of before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from castling_det.config import load_config
from castling_det.layers import CastlingAttention
from castling_det.report.complexity import count_macs, detector_complexity
from tests.report.conftest import Tool
from tests.report.samples import CONFIG, write_test
from tools.complexity import macs_by_part

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "complexity.json").read_text())
IN_THE_FAST_SUITE = {
    "castling_vit/gfl_castling-vit-nano_castling_tree-crowns.py",
    "castling_vit/gfl_castling-vit-nano_softmax_8xb16-100e_coco.py",
    "castling_levit/picodet_castling-levit-128s_softmax_8xb64-300e_coco.py",
    "castling_levit/rtmdet_castling-levit-192_deploy_8xb32-300e_coco.py",
    "castling_mvit/gfl_castling-mvit-t_softmax_8xb2-amp-ms-crop-36e_coco.py",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_THE_FAST_SUITE else pytest.mark.slow) for name in GOLDEN["macs"]]
)
def test_every_config_costs_what_it_did(name: str) -> None:
    """DINO: grid sampling is counted, the weighted sum over the samples is an elementwise product and is not."""
    found = detector_complexity(load_config(ROOT / "configs" / name), tuple(GOLDEN["shape"]))
    expected = GOLDEN["macs"][name]
    assert found.macs == expected if "dino" not in name else 0.998 < found.macs / expected < 1
    assert found.params == GOLDEN["params"][name] and found.uncounted == ()


def _counter_macs(model: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """PyTorch's counter, 2 flops a multiply-add, with softmax attention as two plain matrix products."""
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(*inputs, **keywords)
    return int(flops.get_total_flops()) // 2


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize("mode", ["softmax", "linear", "castling"])
def test_castling_attention(mode: str, local_conv: str | None, normalizer: str) -> None:
    dim, hw, tokens = 24, (5, 7), 35
    layer = CastlingAttention(dim, 3, mode=mode, local_conv=local_conv, normalizer=normalizer)
    x = torch.randn(2, tokens, dim)
    found = count_macs(layer, x, hw)
    assert found.macs == _counter_macs(layer, x, hw)
    columns = dim // 3 + (normalizer == "kernel")
    assert found.macs_by_kind["attention"] == 2 * 2 * tokens * dim * (tokens if mode == "softmax" else columns)
    assert found.macs_by_kind["projections"] == 2 * tokens * 4 * dim * dim
    assert ("local_conv" in found.macs_by_kind) == (local_conv is not None)


def test_the_softmax_branch_is_counted_where_it_runs() -> None:
    """The operator of the masked branch hides its products from torch's counter."""
    x = torch.randn(2, 35, 24)
    options = dict(mode="castling", threshold=0.01)
    with_aux, without = (count_macs(CastlingAttention(24, 3, eval_aux=aux, **options), x, (5, 7)) for aux in (1, 0))
    assert with_aux.macs - without.macs == 2 * 2 * 35 * 35 * 24 and with_aux.uncounted == ()


@pytest.mark.parametrize("sources", [6, 11])
def test_multihead_attention(sources: int) -> None:
    attn = nn.MultiheadAttention(12, 3, batch_first=True)
    query, memory = torch.randn(2, 6, 12), torch.randn(2, sources, 12)
    found = count_macs(attn, query, memory, memory)
    assert found.macs_by_kind == {
        "projections": 2 * (6 * 12 * 12 * 2 + sources * 12 * 12 * 2), "attention": 2 * 2 * 6 * sources * 12,
    }  # fmt: skip


def test_a_transformer_layer_is_counted_although_its_fused_kernel_would_hide_its_parts() -> None:
    layer, x = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(1, 30, 4)
    assert _counter_macs(layer, x) == 0
    assert count_macs(layer, x).macs == 30 * 4 * 16 + 2 * 30 * 30 * 4 + 2 * 30 * 4 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_deformable_attention() -> None:
    """Of 5 queries, 2 levels and 2 points: four neighbours for each of 24 channels, and the projections."""
    levels, tokens = ((5, 7), (3, 4)), 47
    layer = MultiScaleDeformableAttention(
        12, num_heads=3, num_levels=2, num_points=2, batch_first=True, value_proj_ratio=2.0
    )
    found = count_macs(
        layer, query=torch.randn(1, 5, 12), value=torch.randn(1, tokens, 12), reference_points=torch.rand(1, 5, 2, 2),
        spatial_shapes=torch.tensor(levels), level_start_index=torch.tensor([0, 35]),
    )  # fmt: skip
    projections = tokens * 12 * 24 + 5 * 24 * 12 + 5 * 12 * 3 * (3 * 2 * 2)
    assert found.macs_by_kind == {"projections": projections, "attention": 4 * 5 * 2 * 2 * 24}


@torch.library.custom_op("castling_det_test::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


UNCOUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.mv": lambda x: x @ torch.ones(4),
    "aten.dot": lambda x: x[0] @ x[1],
    "aten._euclidean_dist": lambda x: torch.cdist(x, x),
    "aten._trilinear": lambda x: F.bilinear(x, x, torch.ones(2, 4, 4)),
    "aten._fft_r2c": lambda x: torch.fft.fft(x).real,
    "castling_det_test.double": double,
}


class _Runs(nn.Linear):
    """A known layer, and an operator behind it."""

    operator = ""

    def forward(self, x: Tensor) -> Tensor:
        return UNCOUNTED[self.operator](super().forward(x))


@pytest.mark.parametrize("operator", UNCOUNTED)
def test_an_operator_that_nobody_counts_is_named(operator: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), _Runs(4, 4)), torch.randn(30, 4)
    model[1].operator = operator
    found = count_macs(model, x)
    assert found.macs == 2 * 30 * 16 and found.uncounted == (f"{operator} in 1",)


def test_calls_add_up_and_nothing_is_left_behind() -> None:
    conv = nn.Conv2d(3, 5, 1)
    model = nn.Sequential(nn.Dropout(), conv, nn.Conv2d(5, 3, 1), conv)
    model[0].eval()
    found = count_macs(model, torch.randn(1, 3, 4, 4))
    assert found.modules == {"1": {"conv": 2 * 15 * 16}, "2": {"conv": 15 * 16}}
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _tiny(attention: str) -> Config:
    return Config.fromstring(CONFIG.format(seed=0, load_from=None, attention=attention), ".py")


@pytest.mark.parametrize("attention", ["softmax", "linear", "castling"])
def test_a_detector_equals_the_counter(attention: str) -> None:
    from mmdet.registry import MODELS

    config = _tiny(attention)
    found = detector_complexity(config, (64, 90), name="tiny")
    assert found.padded_shape == (64, 96)
    model = MODELS.build(config.model)
    assert found.macs == _counter_macs(model, torch.randn(1, 3, 64, 96), None, mode="tensor")
    assert math.isclose(found.gmacs, found.macs / 1e9)
    assert found.params == sum(found.params_by_part.values()) == sum(p.numel() for p in model.parameters())
    parts, kinds = macs_by_part(found), found.macs_by_kind
    assert set(parts) == set(found.params_by_part) == {"backbone", "neck", "bbox_head"}
    assert sum(parts.values()) == sum(kinds.values()) == found.macs and kinds["head"] == parts["bbox_head"]
    tokens, dim, depth = 4 * 6, 32, 2
    assert kinds["attention"] == depth * 2 * tokens * dim * (tokens if attention == "softmax" else 16)
    assert kinds["mlp"] == depth * 2 * tokens * dim * 4 * dim


def test_the_callers_config_is_left_alone() -> None:
    """Building DINO changes the config that it is built from, and the next build of it would fail."""
    path = next((ROOT / "configs" / "castling_vit").glob("dino-*_linear_*.py"))
    config = load_config(path)
    before = json.dumps(config.model.to_dict())
    first, second = (detector_complexity(config, (160, 320)) for _ in range(2))
    assert first == second and json.dumps(config.model.to_dict()) == before


def test_bad_shapes_and_configs_are_named() -> None:
    config = _tiny("linear")
    with pytest.raises(ValueError, match=r"shape=\(0, 64\)"):
        detector_complexity(config, (0, 64))
    config.model.backbone.type = "Nothing"
    with pytest.raises(ValueError, match=r"model of tiny: cannot be built: .*Nothing"):
        detector_complexity(config, (64, 64), name="tiny")


def test_the_tool(tool: Tool, tmp_path: Path) -> None:
    write_test(tmp_path, mAP=0.1)
    config, out = str(next(tmp_path.glob("*/vis_data/config.py"))), tmp_path / "out.json"
    shape = ("--shape", "64", "80", "--json", str(out))
    softmax = tool("complexity.py", config, *shape, "--modules")
    assert softmax.returncode == 0, softmax.stderr
    for text in ("64 x 80 pixels (height x width) padded to 64 x 96", "gmacs", "backbone.blocks.1.attn "):
        assert text in softmax.stdout
    assert "not counted" not in softmax.stdout
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * (4 * 6) ** 2 * 32
    linear = tool("complexity.py", config, *shape, "--cfg-options", "model.backbone.attention=linear")
    assert linear.returncode == 0
    assert json.loads(out.read_text())["macs_by_kind"]["attention"] == 2 * 2 * 24 * 32 * 16
    missing = tool("complexity.py", str(tmp_path / "no.py"), "--shape", "64", "64")
    assert missing.returncode == 1 and "no.py: no such file" in missing.stderr
