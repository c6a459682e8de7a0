"""The Triton kernels without a GPU: parity in Triton's interpreter, and ahead-of-time compilation for named GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

# RMS of the difference over that of the twin; what is rounded to 16 bits before a product has their precision. The
# interpreter truncates to bfloat16, which doubles its error.
BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# B, H, M, N, K, V.
SHAPES = {"odd": (2, 2, 37, 37, 32, 32), "pooled": (1, 2, 33, 70, 16, 32), "wide": (1, 1, 17, 41, 128, 64)}
THRESHOLDS = ["0", "1/N", "0.02", "1", "inf"]
LONG = (1, 2, 300, 300, 16, 16)
"""More tokens than one program of the linear kernels takes."""


def compared(found, expected):
    return [
        float((one.double() - other).square().mean().sqrt() / other.square().mean().sqrt())
        if other.any() else float(one.abs().max())
        for one, other in zip(found, expected, strict=True)
    ]  # fmt: skip


def packed(function):
    """The packed form of an operator as a function of q, k and v."""
    return lambda q, k, v, *rest: function(torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4), *rest)


def transposed(x):
    """The same tensor with a last axis that is not dense, as a convolution over the channels leaves it."""
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


def masked_cases(dtype):
    from castling_det.ops import masked_softmax, masked_softmax_packed, naive

    def measure(function, tensors, threshold, weights):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        result = function(*leaves, threshold)
        loss = (result.out.double() * weights[0]).sum() + (result.kept_mass.double() * weights[1]).sum()
        loss.backward()
        count = float(result.kept_fraction) * result.kept_mass.numel() * tensors[1].shape[2]
        return [result.out, result.kept_mass, *(x.grad for x in leaves)], round(count)

    for name, (batch, heads, queries, tokens, key_dim, value_dim) in SHAPES.items():
        generator = torch.Generator().manual_seed(len(name))
        sizes = ((queries, key_dim), (tokens, key_dim), (tokens, value_dim), (queries, value_dim), (queries,))
        *inputs, grad_out, grad_mass = (torch.randn(batch, heads, *size, generator=generator) for size in sizes)
        inputs = [x.to(dtype) for x in (2 * inputs[0], *inputs[1:])]
        for text in THRESHOLDS if name == "odd" else ["1/N"]:
            threshold = 1 / tokens if text == "1/N" else float(text)
            exact = [x.double() for x in inputs]
            expected, count = measure(naive.masked_softmax, exact, threshold, (grad_out, grad_mass))
            functions = {"apart": masked_softmax, "packed": packed(masked_softmax_packed)}
            for way, function in list(functions.items())[: 1 + (name == "odd")]:
                found, kept = measure(function, inputs, threshold, (grad_out, grad_mass))
                yield f"masked, {name}, {text}, {way}", compared(found, expected), kept - count


def linear_cases(dtype):
    from castling_det.ops import MaskedSoftmax, linear_angular_attention, linear_angular_packed, naive

    def measure(function, tensors, weight):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        (out.double() * weight).sum().backward()
        return [out, *(x.grad for x in leaves)]

    def branch(aux):
        return MaskedSoftmax(aux, aux[..., 0], aux.sum())

    def local(values):
        return values.roll(1, dims=1) * 0.7

    def apart(q, k, v, aux, own=None):
        return linear_angular_attention(q, transposed(k), v, aux=branch(aux), v_at_q=own)

    def together(q, k, v, aux):
        return packed(lambda x: linear_angular_packed(x, aux=branch(aux), local=local))(q, k, v).transpose(1, 2)

    def twin(q, k, v, aux, own=None):
        return naive.linear_angular_attention(q, k, v, aux=branch(aux), v_at_q=own)

    def twin_together(q, k, v, aux):
        return twin(q, k, v, aux) + local(v.transpose(1, 2)).transpose(1, 2)

    def without(function):
        return lambda q, k, v: function(q, k, v, torch.zeros_like(q))

    def plain(q, k, v):
        return linear_angular_attention(q, k, v)

    for name, (batch, heads, queries, tokens, key_dim, value_dim) in {**SHAPES, "long": LONG}.items():
        generator = torch.Generator().manual_seed(len(name))
        sizes = ((queries, key_dim), (tokens, key_dim), (tokens, value_dim), *[(queries, value_dim)] * 3)
        *inputs, weight = (torch.randn(batch, heads, *size, generator=generator) + 0.3 for size in sizes)
        inputs = [x.to(dtype) for x in inputs]
        ways = {"own": (apart, twin, 5)}
        if queries == tokens:
            ways |= {"alone": (plain, without(twin), 3), "aux": (apart, twin, 4)}
            ways |= {"packed": (together, twin_together, 4)}
        for way, (function, exact, number) in ways.items():
            found = measure(function, inputs[:number], weight)
            expected = measure(exact, [x.double() for x in inputs[:number]], weight)
            yield f"linear, {name}, {way}", compared(found, expected), 0


def edge_cases():
    """Tokens of zeros, no tokens, and controls that must differ."""
    from castling_det.layers import CastlingAttention
    from castling_det.ops import linear_angular_attention, linear_angular_packed, masked_softmax, naive

    # A compiler sees the masked operator as one node and traces the linear formula: both agree with the kernels.
    layer = CastlingAttention(32, 2, threshold=1.0, threshold_unit="uniform")
    x, results = torch.randn(2, 30, 32), []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = function(x, (5, 6))
        results.append([out, *torch.autograd.grad(out.square().sum(), [*layer.parameters()])])
    assert layer.mask_stats.kept_fraction > 0
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert masked_softmax(torch.zeros(1, 1, 0, 16), *torch.zeros(2, 1, 1, 5, 16), 0.1).out.shape == (1, 1, 0, 16)
    for tokens in (37, 41, 49):
        # Every probability is 1 / N, which is not above 1 / N.
        zeros = torch.zeros(1, 1, tokens, 16, requires_grad=True)
        result = masked_softmax(zeros, zeros, zeros + 1, 1 / tokens)
        assert result.kept_fraction == 0 and (result.out == 0).all() and (result.kept_mass == 0).all()
        result.out.sum().backward()
        assert (zeros.grad == 0).all()
        assert masked_softmax(zeros, zeros, zeros, 0.999 / tokens).kept_fraction == 1
    qkv = torch.randn(1, 20, 3, 2, 16)
    qkv[:, 15:] = 0
    qkv.requires_grad_()
    out = linear_angular_packed(qkv)
    out.sum().backward()
    assert (out[:, 15:] == 0).all() and out.isfinite().all() and qkv.grad.isfinite().all()
    assert qkv.grad.abs().max() < 1e3
    q, k, v = torch.randn(3, 1, 1, 30, 16)
    q[0, 0, 0, 0] = torch.nan
    assert masked_softmax(q, k, v, 0.05).out[0, 0, 0].isnan().all()
    q[0, 0, 0, 0] = 1
    off = masked_softmax(q, k, v, 0.05).out - naive.masked_softmax(q, k, v, 0.04).out
    swapped = linear_angular_attention(q, k, v) - naive.linear_angular_attention(k, q, v)
    yield "controls", [float(off.abs().max()), float(swapped.abs().max())], 0


def parity() -> None:
    """Run in the interpreter: prints each case with its errors."""
    from castling_det.ops.numerics import uses_kernels

    assert uses_kernels(torch.zeros(1))
    for name in BOUNDS:
        dtype = getattr(torch, name)
        for cases in (masked_cases(dtype), linear_cases(dtype)):
            for case, errors, difference in cases:
                print(json.dumps([name, case, errors, difference]), flush=True)
    for case, errors, difference in edge_cases():
        print(json.dumps(["", case, errors, difference]))


@pytest.fixture(scope="module")
def measured() -> list[list]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.test_triton"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_interpreter_agrees_with_the_twin(measured):
    *cases, controls = measured
    assert len(cases) == 3 * (2 * len(THRESHOLDS) + 2 + len(SHAPES) + 1 + 2 * 3)
    for dtype, case, errors, difference in cases:
        assert max(errors) < BOUNDS[dtype], (dtype, case, errors)
        # In 16 bits a probability within a rounding of the threshold may fall on its other side.
        assert abs(difference) <= (0 if dtype == "float32" else 2), (dtype, case, difference)
    assert min(controls[2]) > 1e-3

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
SUMS = {"mass", "sums", "grad_mass", "tops", "inverses", "kv", "partial", "grad_kv"}
STRIDES = ("_b", "_h", "_m", "_n")
SMALL, LARGE = 64 * 1024, 160 * 1024
"""Bytes of shared memory: of any GPU, and of those that `fits` asks for."""
COMPILED = [
    *(("masked_softmax", dtype, width, SMALL) for dtype in POINTERS for width in (32, 128)),
    *(("linear_angular", "bfloat16", width, SMALL) for width in (32, 64)),
    ("linear_angular", "bfloat16", 128, LARGE),
    ("linear_angular", "float32", 64, LARGE),
]


def compiled(name, kernel, dtype, width, target):
    """A kernel as a launch on dense, aligned tensors compiles it."""
    from triton.compiler import ASTSource

    from castling_det.ops.numerics import kernels

    module, torch_dtype = kernels(name), getattr(torch, dtype)
    function = getattr(module, kernel)
    if name == "masked_softmax":
        rows, columns, warps = module.tile(torch_dtype, width, gradient=kernel != "_forward_kernel")
        options = {"BM": rows, "BN": columns, "num_warps": warps}
    else:
        options = module.tile(torch_dtype, width) | {"PRECISION": module.precision(torch_dtype)}
    options |= {"K": width, "V": width, "BK": width, "BV": width, "AUX": True, "COPY": True, "ADD": True}
    names = function.arg_names
    constants = {key: options[key] for key in names if key in options}
    numbers = dict.fromkeys(("scale", "threshold", "factor", "share"), "fp32") | {"kept": "*i32"}
    integers = {"heads", "queries", "tokens", "chunk"} | {key for key in names if key[-2:] in STRIDES}
    kinds = numbers | dict.fromkeys(SUMS, "*fp32") | dict.fromkeys(integers, "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {key: kinds.get(key, POINTERS[dtype]) for key in names}
    aligned = [key for key in names if signature[key][0] == "*" or key[-2:] in STRIDES]
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    return triton.compile(source, target=target, options={k: options[k] for k in options if k.startswith("num_")})


def kernels_of(name):
    from castling_det.ops.numerics import kernels

    return [kernel for kernel in vars(kernels(name)) if kernel.endswith("_kernel")]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "dtype", "width", "memory"), COMPILED)
def test_compiles_for_gpus_within_their_registers_and_memory(name, dtype, width, memory, capability, tmp_path):
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    architecture = f"sm_{capability}" + "a" * (capability == 90)
    assert len(kernels_of(name)) == (3 if name == "masked_softmax" else 4)
    for kernel in kernels_of(name):
        result = compiled(name, kernel, dtype, width, GPUTarget("cuda", capability, 32))
        (tmp_path / "kernel.ptx").write_text(result.asm["ptx"])
        command = [str(assembler), "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
        assert result.metadata.shared <= memory, (kernel, result.metadata.shared)
        assert int(spilled) <= (0 if dtype == "bfloat16" else 64), (kernel, said)


@pytest.mark.parametrize("name", ["masked_softmax", "linear_angular"])
def test_compiles_for_rocm(name):
    for kernel in kernels_of(name):
        result = compiled(name, kernel, "bfloat16", 64, GPUTarget("hip", "gfx942", 64))
        assert result.metadata.shared <= SMALL and result.asm["amdgcn"]


def test_plain_operations_can_be_asked_for(monkeypatch):
    from castling_det.ops.numerics import uses_kernels

    x = torch.zeros(1)
    assert not uses_kernels(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_kernels(x) and not uses_kernels(x.double())
    monkeypatch.setenv("CASTLING_DET_PLAIN", "1")
    assert not uses_kernels(x)


if __name__ == "__main__":
    parity()
