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

pytest.importorskip("triton")

# RMS of the difference over that of the twin; what is rounded to 16 bits before a product has their precision.
BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# B, H, M, N, K, V; threshold as a multiple of 1 / N, or as it is where it is text.
SHAPES = {"odd": (2, 2, 37, 37, 32, 32), "pooled": (1, 2, 33, 70, 16, 32), "wide": (1, 1, 17, 41, 128, 64)}
THRESHOLDS = ["0", "1/N", "0.02", "1", "inf"]


def parity() -> None:
    """Run in the interpreter: prints each case with its errors."""
    from castling_det.ops import masked_softmax, masked_softmax_packed, naive
    from castling_det.ops.numerics import uses_kernels

    def measure(function, tensors, threshold, weights):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        result = function(*leaves, threshold)
        loss = (result.out.double() * weights[0]).sum() + (result.kept_mass.double() * weights[1]).sum()
        loss.backward()
        count = float(result.kept_fraction) * result.kept_mass.numel() * tensors[1].shape[2]
        return [result.out, result.kept_mass, *(x.grad for x in leaves)], round(count)

    def packed(q, k, v, threshold):
        return masked_softmax_packed(torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4), threshold)

    for dtype in BOUNDS:
        for name, (batch, heads, queries, tokens, key_dim, value_dim) in SHAPES.items():
            generator = torch.Generator().manual_seed(len(name))
            sizes = ((queries, key_dim), (tokens, key_dim), (tokens, value_dim))
            inputs = [torch.randn(batch, heads, *size, generator=generator) for size in sizes]
            inputs[0] *= 2
            inputs = [x.to(getattr(torch, dtype)) for x in inputs]
            weights = [torch.randn(batch, heads, queries, value_dim, generator=generator).double(),
                       torch.randn(batch, heads, queries, generator=generator).double()]  # fmt: skip
            for text in THRESHOLDS if name == "odd" else ["1/N"]:
                threshold = 1 / tokens if text == "1/N" else float(text)
                expected, count = measure(naive.masked_softmax, [x.double() for x in inputs], threshold, weights)
                functions = {"apart": masked_softmax} | ({"packed": packed} if name == "odd" else {})
                for way, function in functions.items():
                    assert uses_kernels(inputs[0])
                    found, kept = measure(function, inputs, threshold, weights)
                    errors = [
                        float((one.double() - other).square().mean().sqrt() / other.square().mean().sqrt())
                        if other.any() else float(one.abs().max())
                        for one, other in zip(found, expected, strict=True)
                    ]  # fmt: skip
                    print(json.dumps([dtype, name, text, way, errors, kept - count, count]), flush=True)
    nothing = [torch.zeros(1, 1, 0, 16), torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 16)]
    assert masked_softmax(*nothing, 0.1).out.shape == (1, 1, 0, 16)
    # The control: another threshold is another result.
    q, k, v = (torch.randn(1, 1, 30, 16) for _ in range(3))
    off = masked_softmax(q, k, v, 0.05).out - naive.masked_softmax(q, k, v, 0.04).out
    print(json.dumps(["control", "", "", "", [float(off.abs().max())], 0, 0]))


@pytest.fixture(scope="module")
def measured() -> list[list]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.test_triton"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_interpreter_agrees_with_the_twin(measured):
    *cases, control = measured
    assert len(cases) == 3 * (2 * len(THRESHOLDS) + 2)
    for dtype, name, text, way, errors, difference, count in cases:
        case = f"{dtype}, {name}, threshold {text}, {way}: {errors}, {difference} of {count}"
        assert max(errors) < BOUNDS[dtype], case
        assert difference == 0, case
        assert (count == 0) == (text in ("1", "inf")), case
    assert control[4][0] > 1e-3


POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_query_kernel", "_key_kernel"])
def test_compiles_for_gpus_within_their_registers_and_memory(kernel, width, dtype, capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from castling_det.ops import triton_masked_softmax as kernels

    function = getattr(kernels, kernel)
    rows, columns, warps = kernels.tile(getattr(torch, dtype), width, gradient=kernel != "_forward_kernel")
    constants = {"K": width, "V": width, "BK": width, "BV": width, "BM": rows, "BN": columns}
    floats = {"scale", "scale_log2", "threshold"}
    sums = {"mass", "lse", "sums", "grad_mass"}
    tensors = {"q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"}
    kinds = {name: POINTERS[dtype] for name in tensors} | {name: "*fp32" for name in sums} | {"kept": "*i32"}
    kinds |= dict.fromkeys(floats, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    source = ASTSource(
        function, signature, constexprs={(function.arg_names.index(n),): c for n, c in constants.items()}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 64 * 1024, f"{compiled.metadata.shared} bytes of shared memory"
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    name = f"sm_{capability}" + "a" * (capability == 90)
    command = [str(assembler), "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= (0 if dtype == "bfloat16" else 64), said


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
