"""LeViT's attention: values wider than keys, fewer queries than values, biases at any size, fused norms."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn import functional as F

from castling_det.layers import ATTENTION_MODES, LevitAttention, LevitStem, fuse_norms
from castling_det.layers.levit_attention import resized_biases
from castling_det.ops import NORMALIZERS, linear_angular_attention, masked_softmax, naive
from tests.compare import assert_parity, assert_same_gradients, errors
from tests.ops.test_linear_angular import value_and_gradients
from tests.oracles.published import published_attention

HEADS, KEYS, VALUES, DIM = 3, 4, 8, 20
SIZES = [(1, 1), (1, 6), (4, 4), (5, 7)]


def rectangular(queries, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, KEYS), (tokens, KEYS), (tokens, VALUES), (queries, VALUES)]
    stacked = [torch.randn(2, HEADS, *shape, generator=generator, dtype=torch.float64) + 0.3 for shape in shapes]
    return [x.requires_grad_() for x in stacked]


def randomised(module, seed=0):
    """Every parameter and statistic drawn anew, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.double().state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise * 0.4)
    return module


def layer(mode, stride=1, **options):
    defaults = dict(key_dim=KEYS, num_heads=HEADS, attn_ratio=VALUES / KEYS, resolution=5, threshold_unit="uniform")
    built = LevitAttention(DIM, 12, query_stride=stride, mode=mode, **{**defaults, "threshold": 0.9, **options})
    return randomised(built)


def tokens_of(hw, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, hw[0] * hw[1], DIM, generator=generator, dtype=torch.float64).requires_grad_()


def at_queries(x, hw, stride):
    """Rows of (B, N, ...) at every `stride`-th place, by index arithmetic."""
    places = [y * hw[1] + x for y in range(0, hw[0], stride) for x in range(0, hw[1], stride)]
    return x[:, places]


@pytest.mark.parametrize("hybrid", [False, True], ids=["linear", "hybrid"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (6, 20), (12, 35), (30, 7)])
def test_rectangular_operators_equal_their_twins(queries, tokens, normalizer, hybrid, monkeypatch):
    # The function of the same name hides the module as an attribute of the package.
    monkeypatch.setattr(sys.modules[masked_softmax.__module__], "_BLOCK_ELEMENTS", 50)

    def evaluated(attention, softmax):
        def function(q, k, v, v_at_q):
            aux = softmax(q, k, v, 1.1 / tokens) if hybrid else None
            return attention(q, k, v, normalizer=normalizer, aux=aux, v_at_q=v_at_q) + 0 * v_at_q

        return value_and_gradients(function, rectangular(queries, tokens))

    fast = evaluated(linear_angular_attention, masked_softmax)
    slow = evaluated(naive.linear_angular_attention, naive.masked_softmax)
    for what, actual, expected in zip(("out", "dq", "dk", "dv", "dv_at_q"), fast, slow, strict=True):
        if expected.abs().max() < 1e-12:
            assert actual.abs().max() < 1e-12, what
        else:
            assert_parity(actual, expected, rms=1e-12, maximum=1e-11, what=what)


def test_masked_softmax_of_fewer_queries_counts_its_own_entries():
    q, k, v, _ = (x.detach() for x in rectangular(6, 20))
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(KEYS), dim=-1)
    result = masked_softmax(q, k, v, 0.05)
    torch.testing.assert_close(result.kept_fraction, (p > 0.05).double().mean().float())
    assert result.out.shape == (2, HEADS, 6, VALUES) and result.kept_mass.shape == (2, HEADS, 6)


def test_shapes_that_do_not_belong_together_are_refused():
    q, k, v, v_at_q = rectangular(6, 20)
    for own in (None, v_at_q[:, :, :5], v_at_q[..., :3]):
        with pytest.raises(ValueError, match="one common shape"):
            linear_angular_attention(q, k, v, v_at_q=own)
    for wrong in ((q[..., :3], k, v), (q, k[:, :, :9], v), (q[:, :2], k, v), (q[0], k, v)):
        with pytest.raises(ValueError, match="one common shape"):
            linear_angular_attention(*wrong, v_at_q=v_at_q)


def projected(attn, x, hw):
    """q, k, v of every token, (B, H, N, .), by explicit slices of the weights; norms in eval mode."""

    def linear_norm(part, x):
        bn = part.bn
        y = x @ part.linear.weight.T
        return (y - bn.running_mean) / torch.sqrt(bn.running_var + bn.eps) * bn.weight + bn.bias

    def heads(packed, width):
        return packed.reshape(len(x), -1, HEADS, width)

    if attn.query_stride == 1:
        packed = heads(linear_norm(attn.qkv, x), 2 * KEYS + VALUES)
        q, k, v = packed[..., :KEYS], packed[..., KEYS : 2 * KEYS], packed[..., 2 * KEYS :]
    else:
        packed = heads(linear_norm(attn.kv, x), KEYS + VALUES)
        q, k, v = heads(linear_norm(attn.q.ln, x), KEYS), packed[..., :KEYS], packed[..., KEYS:]
    return [part.transpose(1, 2) for part in (q, k, v)], lambda y: linear_norm(attn.proj.ln, F.hardswish(y))


def bias_table(attn, hw):
    """(H, N, N) at the table's own resolution, one distance at a time."""
    side = attn.resolution
    assert hw == (side, side)
    bias = torch.empty(HEADS, side * side, side * side, dtype=torch.float64)
    for i in range(side * side):
        for j in range(side * side):
            dy, dx = abs(i // side - j // side), abs(i % side - j % side)
            bias[:, i, j] = attn.attention_biases[:, dy * side + dx]
    return bias


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_is_the_whole_block_at_the_places_of_the_queries(mode, stride, hw):
    """The published block (or LeViT's softmax) on all tokens, convolution too; its rows at the queries' places."""
    if mode == "softmax":
        hw = (5, 5)
    attn = layer(mode, stride).eval()
    attn.eval_aux = mode == "castling"
    x = tokens_of(hw)
    (q, k, v), projection = projected(attn, x, hw)
    tokens = hw[0] * hw[1]
    if mode == "softmax":
        p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(KEYS) + bias_table(attn, hw), dim=-1)
        whole = p @ v
    else:
        # The oracle's one head width: zero channels change no cosine, and the factor restores the softmax' scale.
        factor = (VALUES / KEYS) ** 0.25
        wide_q, wide_k = (F.pad(part * factor, (0, VALUES - KEYS)) for part in (q, k))
        whole = published_attention(wide_q, wide_k, v, 0.9 / tokens if mode == "castling" else None)
    image = v.transpose(2, 3).reshape(len(x), HEADS * VALUES, *hw)
    convolved = F.conv2d(image, attn.dconv.weight, padding=1, groups=HEADS * VALUES).flatten(2).transpose(1, 2)
    merged = whole.transpose(1, 2).reshape(len(x), tokens, HEADS * VALUES) + convolved
    expected = projection(at_queries(merged, hw, stride))
    actual = attn(x, hw)
    assert_parity(actual, expected, rms=1e-12, maximum=1e-11)
    inputs = {"x": x, **dict(attn.named_parameters())}
    # With a single key nothing depends on the logits.
    assert_same_gradients(actual, expected, inputs, rms=1e-10, maximum=1e-9, zero=1e-10)


def test_negative_controls_are_seen():
    """Values taken at other places, rows and columns of distances swapped, the convolution left out."""
    hw, attn = (5, 7), layer("linear", 2).eval()
    x = tokens_of(hw).detach()
    actual = attn(x, hw)
    shifted = layer("linear", 2).eval()
    shifted.dconv.weight.data = shifted.dconv.weight.data.roll(1, -1)
    without = layer("linear", 2).eval()
    without.dconv = None
    for wrong in (shifted, without):
        assert errors(wrong(x, hw), actual)[0] > 1e-3
    q, k, v, own = rectangular(6, 20)
    right = linear_angular_attention(q, k, v, v_at_q=own)
    assert errors(linear_angular_attention(q, k, v, v_at_q=own.roll(1, 2)), right)[0] > 1e-3
    softmax = layer("softmax").eval()
    x = tokens_of((5, 5)).detach()
    before = softmax(x, (5, 5))
    table = softmax.attention_biases.data
    table.copy_(table.reshape(HEADS, 5, 5).transpose(1, 2).reshape(HEADS, 25))
    assert errors(softmax(x, (5, 5)), before)[0] > 1e-3


@pytest.mark.parametrize("stride", [1, 2])
def test_token_convolution_at_the_places_of_the_queries(stride):
    attn, hw = layer("linear", stride, local_conv="tokens"), (3, 5)
    v = torch.randn(2, 15, HEADS * VALUES, dtype=torch.float64)
    padded = F.pad(v, (0, 0, 4, 4)).reshape(2, 23, HEADS, VALUES)
    weight = attn.dconv.weight[:, 0, :, 0]
    expected = sum(padded[:, tap : tap + 15] * weight[:, tap, None] for tap in range(9)).flatten(2)
    assert_parity(attn.dconv(v, hw), at_queries(expected, hw, stride), rms=1e-13, maximum=1e-12)


def test_biases_at_another_size():
    table = torch.randn(HEADS, 25, dtype=torch.float64)
    assert resized_biases(table, (5, 5)) is table
    for hw in ((9, 9), (3, 11), (1, 4), (1, 1)):
        resized = resized_biases(table, hw).reshape(HEADS, *hw)
        old = table.reshape(HEADS, 5, 5)
        assert torch.equal(resized[:, 0, 0], old[:, 0, 0]), "distance 0 keeps its bias"
        rows, columns = (4 if size > 1 else 0 for size in hw)
        torch.testing.assert_close(resized[:, -1, -1], old[:, rows, columns])
    halfway = resized_biases(table, (9, 9)).reshape(HEADS, 9, 9)
    torch.testing.assert_close(halfway[:, ::2, ::2], table.reshape(HEADS, 5, 5))
    torch.testing.assert_close(halfway[:, 0, 1], (table[:, 0] + table[:, 1]) / 2)
    # A ramp along dx stays one: rows and columns are not exchanged.
    ramp = torch.arange(5.0, dtype=torch.float64).repeat(5).expand(1, -1)
    torch.testing.assert_close(resized_biases(ramp, (3, 9)), (torch.arange(9) / 2).double().repeat(3).expand(1, -1))


@pytest.mark.parametrize("stride", [1, 2])
def test_biases_of_a_rectangular_map_go_by_distance(stride):
    attn, hw = layer("softmax", stride), (3, 7)
    table = resized_biases(attn.attention_biases, hw).reshape(HEADS, *hw)
    bias = attn.biases(hw)[0]
    queries = at_queries(torch.arange(21)[None], hw, stride)[0].tolist()
    assert bias.shape == (HEADS, len(queries), 21)
    for row, place in enumerate(queries):
        for j in range(21):
            assert torch.equal(bias[:, row, j], table[:, abs(place // 7 - j // 7), abs(place % 7 - j % 7)])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_fused_norms_compute_the_same(mode, stride):
    attn, hw = layer(mode, stride).eval(), (5, 7)
    x = tokens_of(hw).detach()
    before = attn(x, hw)
    fuse_norms(attn)
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in attn.modules())
    assert_parity(attn(x, hw), before, rms=1e-13, maximum=1e-12)


def test_a_fused_stem_computes_the_same():
    stem = randomised(LevitStem(3, 16)).eval()
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    before = stem(x)
    assert fuse_norms(stem) == 4 and not any(isinstance(module, torch.nn.BatchNorm2d) for module in stem.modules())
    for actual, expected in zip(stem(x), before, strict=True):
        assert_parity(actual, expected, rms=1e-13, maximum=1e-12)


def test_norms_in_training_mode_are_not_fused():
    attn = layer("linear")
    attn.eval().proj.train()
    with pytest.raises(ValueError, match=r"proj\.ln: is in training mode; call eval"):
        fuse_norms(attn)
    assert hasattr(attn.qkv, "bn"), "nothing is fused then"
