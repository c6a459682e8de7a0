"""The compiled kernel: equal to the plain operations, taken where it may be, and nowhere else."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from castling_det.cli import main
from castling_det.conversion.probes import take_plain_operations
from castling_det.layers import CastlingAttention
from castling_det.ops import native
from tests.compare import assert_parity

ORIGINAL_FOLDER = native._cache_folder
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Built once into a cache of its own; other tests run without it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(native, "_cache_folder", lambda: folder)
        native.is_built.cache_clear()
        yield native.build()
    native.is_built.cache_clear()


def randomised(dim, num_heads, **options):
    generator = torch.Generator().manual_seed(dim + num_heads)
    layer = CastlingAttention(dim, num_heads, mode="linear", **options)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return layer.double().eval().requires_grad_(False)


def packed(batch, tokens, dim):
    generator = torch.Generator().manual_seed(tokens)
    # A common mean, as features have one: k^T v does not cancel.
    return torch.randn(batch, tokens, 3 * dim, generator=generator, dtype=torch.float64) + 0.3


CASES = [
    ((1, 1), dict(dim=16, num_heads=1)),
    ((7, 9), dict(dim=64, num_heads=4)),
    ((5, 13), dict(dim=48, num_heads=1, local_conv_kernel_size=7)),
    ((20, 21), dict(dim=96, num_heads=2, local_conv_kernel_size=5, num_prefix_tokens=3)),
    ((9, 31), dict(dim=64, num_heads=2, local_conv=None)),
]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize(("hw", "options"), CASES, ids=[f"{hw[0]}x{hw[1]}" for hw, _ in CASES])
def test_it_is_the_plain_operations(kernel, hw, options, normalizer, threads):
    layer = randomised(**options, normalizer=normalizer)
    qkv = packed(3, layer.num_prefix_tokens + hw[0] * hw[1], layer.dim)
    expected = layer.attend(qkv, hw)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = layer.float().attend(qkv.float(), hw)
    finally:
        torch.set_num_threads(before)
    assert_parity(found, expected, rms=1e-6, maximum=1e-5)
    if hw[0] > 1 and layer.dconv is not None:
        with pytest.raises(AssertionError):
            assert_parity(layer.attend(qkv.float(), hw[::-1]), expected, rms=1e-6, maximum=1e-5)


@needs_compiler
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
def test_tokens_without_a_direction_stay_as_they_are(kernel, normalizer):
    layer = randomised(64, 4, normalizer=normalizer)
    qkv = packed(2, 63, 64)
    qkv[0] = 0
    qkv[1, ::3] = 0
    found = layer.float().attend(qkv.float(), (7, 9))
    assert found.isfinite().all()
    assert_parity(found, layer.double().attend(qkv, (7, 9)), rms=1e-6, maximum=1e-5)


@pytest.fixture
def calls(kernel, monkeypatch):
    counted = []
    original = native.linear_angular
    monkeypatch.setattr(native, "linear_angular", lambda *args: counted.append(1) or original(*args))
    return counted


@needs_compiler
def test_prediction_takes_it(calls):
    layer = CastlingAttention(32, 2, mode="castling").eval()
    with torch.no_grad():
        layer(torch.randn(1, 12, 32), (3, 4))
    assert calls == [1]


@needs_compiler
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (dict(mode="softmax"), torch.float32),
        (dict(mode="linear", local_conv="tokens"), torch.float32),
        (dict(mode="linear"), torch.bfloat16),
        (dict(mode="castling", eval_aux=True, threshold=0.0), torch.float32),
        (dict(mode="linear", dim=24), torch.float32),
    ],
    ids=["softmax", "tokens", "bfloat16", "aux", "12 channels"],
)
def test_what_it_cannot_do_runs_plain(calls, options, dtype):
    layer = CastlingAttention(options.pop("dim", 32), 2, **options).eval().to(dtype)
    with torch.no_grad():
        assert layer(torch.randn(1, 12, layer.dim, dtype=dtype), (3, 4)).isfinite().all()
    assert calls == []


@needs_compiler
def test_gradients_autocast_and_tracing_run_plain(calls):
    layer, x = CastlingAttention(32, 2, mode="linear").eval(), torch.randn(1, 12, 32)
    layer(x, (3, 4)).sum().backward()
    assert layer.dconv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x, (3, 4))
        torch.export.export(layer, (x, (3, 4)))
        layer.requires_grad_(False)
        torch.jit.trace(lambda x: layer(x, (3, 4)), x, check_trace=False)
        layer.native = False
        layer(x, (3, 4))
    assert calls == []


@needs_compiler
def test_a_compiler_that_gets_it_wrong_is_found_out(monkeypatch, tmp_path):
    """In a process of its own an operator is registered once: here the check alone, with a wrong operator."""
    monkeypatch.setattr(native, "linear_angular", lambda qkv, *_: qkv[..., 128:] * 1.0001)
    with pytest.raises(OSError, match=r"off by .* it is not used"):
        native._check()


@pytest.mark.parametrize(
    ("compiler", "problem"), [("/no/such/c++", "cannot be run"), ("false", "exit code 1; g\\+\\+ 11")], ids=str
)
def test_without_a_working_compiler_one_line_says_so(monkeypatch, tmp_path, capsys, compiler, problem):
    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    monkeypatch.setenv("CXX", compiler)
    native.is_built.cache_clear()
    with pytest.raises(OSError, match=problem):
        native.build()
    assert main(["build"]) == 1 and compiler in capsys.readouterr().err
    assert not native.is_built() and list(tmp_path.rglob("*.so")) == []
    native.is_built.cache_clear()


def test_it_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ORIGINAL_FOLDER() == tmp_path / "castling_det"


@needs_compiler
def test_a_conversion_is_measured_without_it(kernel):
    """The softmax branch runs in plain operations: beside it the kernel's rounding would look like drift."""
    hybrid, linear = (nn.Sequential(CastlingAttention(32, 2, mode=mode)) for mode in ("castling", "linear"))
    for model in (hybrid, linear):
        take_plain_operations(model)
        assert not model[0].native


@needs_compiler
def test_the_command_builds_and_removes(kernel, capsys):
    assert main(["build"]) == 0 and str(kernel) in capsys.readouterr().out
    content = kernel.read_bytes()
    assert main(["build", "--remove"]) == 0 and not kernel.exists()
    native.is_built.cache_clear()
    assert not native.is_built()
    kernel.write_bytes(content)
    native.is_built.cache_clear()
    assert native.is_built()
