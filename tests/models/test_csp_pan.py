"""`CSPPAN`: published parameter counts, an oracle from the published layer list, sizes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from castling_det.models import CSPPAN
from tests.compare import assert_parity, errors
from tests.models.backbones import randomised, weighted_sum

# PaddleDetection, configs/picodet/_base_/picodet_esnet.yml and legacy_model/picodet_{s,m,l}_*: ESNet's channels at
# strides 8, 16, 32; CSPPAN.out_channels.
PUBLISHED = {"s": ((96, 192, 384), 96), "m": ((128, 256, 512), 128), "l": ((160, 320, 640), 160)}


def conv_bn(channels, width):
    """Parameters of a 1x1 convolution without bias, with BatchNorm."""
    return channels * width + 2 * width


def separable(width):
    return 25 * width + 2 * width + conv_bn(width, width)


def neck_params(in_channels, width):
    """Three 1x1, four cross-stage layers, two convolutions down, two for the extra level.

    A cross-stage layer, 2 C to C: two branches of C / 2, a bottleneck of 1x1 and depthwise separable 5x5, the last 1x1.
    """
    half = width // 2
    cross_stage = 2 * conv_bn(2 * width, half) + conv_bn(half, half) + separable(half) + conv_bn(width, width)
    return sum(conv_bn(channels, width) for channels in in_channels) + 4 * cross_stage + 4 * separable(width)


def small(**options):
    return CSPPAN(**{**dict(in_channels=(6, 10, 14), out_channels=8), **options})


def maps(size, channels=(6, 10, 14), dtype=torch.float64, seed=1):
    """Maps of strides 8, 16, 32, ... of an image, each side rounded up."""
    generator = torch.Generator().manual_seed(seed)
    sides = [[math.ceil(side / 2 ** (3 + level)) for side in size] for level in range(len(channels))]
    return [
        torch.randn(2, c, h, w, generator=generator, dtype=dtype) for c, (h, w) in zip(channels, sides, strict=True)
    ]


def oracle(neck, inputs, extra_from_the_lateral=True):
    """The published forward, written out layer by layer for three maps whose sides double."""
    state = dict(neck.named_parameters()) | dict(neck.named_buffers())

    def conv(name, x, stride=1):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (state[f"{name}.bn.{key}"][:, None, None] for key in keys)
        x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        return x * (x + 3).clamp(0, 6) / 6

    def depthwise(name, x, stride=1):
        return conv(f"{name}.pointwise_conv", conv(f"{name}.depthwise_conv", x, stride))

    def mix(name, first, second):
        x = torch.cat([first, second], 1)
        main = depthwise(f"{name}.blocks.0.1", conv(f"{name}.blocks.0.0", conv(f"{name}.main_conv", x)))
        return conv(f"{name}.final_conv", torch.cat([main, conv(f"{name}.short_conv", x)], 1))

    def doubled(x):
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    c3, c4, c5 = (conv(f"reduce.{index}", x) for index, x in enumerate(inputs))
    t4 = mix("top_down.0", doubled(c5), c4)
    p3 = mix("top_down.1", doubled(t4), c3)
    p4 = mix("bottom_up.0", depthwise("downsamples.0", p3, 2), t4)
    p5 = mix("bottom_up.1", depthwise("downsamples.1", p4, 2), c5)
    lateral = c5 if extra_from_the_lateral else p5
    return p3, p4, p5, depthwise("extra_from_input", lateral, 2) + depthwise("extra_from_output", p5, 2)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_the_published_ones(size):
    in_channels, width = PUBLISHED[size]
    neck = CSPPAN(in_channels, out_channels=width)
    assert sum(p.numel() for p in neck.parameters()) == neck_params(in_channels, width)


def test_outputs_and_gradients_are_those_of_the_published_layers():
    neck = randomised(small().double()).eval()
    inputs = [x.requires_grad_() for x in maps((64, 128))]
    actual, expected = neck(inputs), oracle(neck, inputs)
    for level, pair in enumerate(zip(actual, expected, strict=True)):
        assert_parity(*pair, rms=1e-12, maximum=1e-11, what=f"level {level}")
    parameters = dict(neck.named_parameters())
    leaves = [*inputs, *parameters.values()]
    gradients = [torch.autograd.grad(weighted_sum(out), leaves) for out in (actual, expected)]
    for name, *pair in zip([*"012", *parameters], *gradients, strict=True):
        assert_parity(*pair, rms=1e-11, maximum=1e-10, what=f"gradient of {name}")
    assert errors(oracle(neck, inputs, extra_from_the_lateral=False)[3], expected[3])[0] > 1e-2


@pytest.mark.parametrize("num_outs", [3, 4])
@pytest.mark.parametrize("size", [(416, 416), (100, 420)], ids=str)
def test_levels_of_any_size(size, num_outs):
    outputs = small(num_outs=num_outs).eval()(maps(size, dtype=torch.float32))
    sides = [[math.ceil(side / stride) for side in size] for stride in (8, 16, 32, 64)[:num_outs]]
    assert [list(x.shape) for x in outputs] == [[2, 8, *hw] for hw in sides]


def test_a_backbone_with_a_map_of_stride_64_gives_it_itself():
    neck = small(in_channels=(6, 10, 14, 18), num_outs=4)
    inputs = maps((416, 416), (6, 10, 14, 18), dtype=torch.float32)
    outputs = neck(inputs)
    assert [x.shape[-2:] for x in outputs] == [x.shape[-2:] for x in inputs]
    assert not any("extra" in name for name, _ in neck.named_modules())
    outputs[3].sum().backward()
    # The topmost output is reached from every input.
    assert all(layer.conv.weight.grad.abs().max() > 0 for layer in neck.reduce)


def test_every_parameter_receives_a_gradient():
    neck = randomised(small(num_csp_blocks=2, kernel_size=3, act_cfg=dict(type="LeakyReLU")).double()).train()
    weighted_sum(neck(maps((128, 192)))).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_convolutions_start_uniform():
    torch.manual_seed(0)
    neck = small()
    neck.init_weights()
    for name, module in neck.named_modules():
        if isinstance(module, nn.Conv2d):
            bound = math.sqrt(6 / module.weight[0].numel())
            assert 0.8 * bound < module.weight.abs().max() <= bound, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(in_channels=(6,)), r"in_channels=\(6,\): expected at least two maps"),
        (dict(num_outs=5), r"num_outs=5: expected the number of maps, 3, or one more"),
        (dict(out_channels=9), r"out_channels=9: expected an even number"),
        (dict(kernel_size=4), r"kernel_size=4: expected an odd positive number"),
        ({}, r"inputs: expected 3 maps, .* got 2"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)(maps((64, 64), (6, 10), dtype=torch.float32))
