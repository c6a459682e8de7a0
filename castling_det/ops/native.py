"""The compiled kernel of linear attention on a CPU: built on request, used where it exists, never needed.

`castling-det build` compiles `csrc/linear_angular.cpp` into the user's cache. From then on `CastlingAttention` takes it
for float32 on a CPU without gradients; everything else, and every machine without it, runs the plain operations.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LANES", "build", "is_built", "library_path", "linear_angular", "usable"]

LANES = 16
"""The kernel takes heads whose channels are a multiple of this."""

_SOURCE = Path(__file__).parent / "csrc" / "linear_angular.cpp"
_TOLERANCE = 1e-5


def library_path() -> Path:
    """Where the kernel lies for this torch, this processor and this version of its source."""
    key = hashlib.sha256(_SOURCE.read_bytes())
    key.update(f"{torch.__version__} {platform.machine()} {_instructions()}".encode())
    return _cache_folder() / f"linear_angular-{key.hexdigest()[:16]}.so"


def build() -> Path:
    """Compiles the kernel, compares it with the plain operations, and returns its place; a second call does nothing.

    Raises:
        OSError: no compiler, it failed, or its result is wrong; nothing is left behind.
    """
    path = library_path()
    if path.is_file() and is_built():
        return path
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("no C++ compiler was found: install g++ or set CXX; without the kernel everything works")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.so")
    try:
        _compile(compiler, part)
        if not _registered():
            torch.ops.load_library(part)
        _check()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    is_built.cache_clear()
    return path


@functools.cache
def is_built() -> bool:
    """Whether the kernel is there; loads it."""
    path = library_path()
    if not path.is_file():
        return False
    try:
        # A library that registers its operator twice ends the process.
        if not _registered():
            torch.ops.load_library(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be loaded ({error}); run `castling-det build` again", stacklevel=2)
        return False
    return True


def usable(qkv: Tensor, weight: Tensor | None, num_heads: int) -> bool:
    """Whether the kernel may take the place of the plain operations: there, float32, CPU, no gradients, no tracing.

    Args:
        qkv: packed projection, (B, N, 3 * C).
        weight: of the local convolution, (C, 1, k, k), or None.
        num_heads: heads H.
    """
    if type(qkv) is not Tensor or qkv.device.type != "cpu" or qkv.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if torch.is_autocast_enabled("cpu") or (qkv.shape[-1] // (3 * num_heads)) % LANES:
        return False
    if torch.is_grad_enabled() and (qkv.requires_grad or (weight is not None and weight.requires_grad)):
        return False
    return is_built()


def linear_angular(qkv: Tensor, weight: Tensor | None, num_heads: int, hw: tuple[int, int], normalizer: str) -> Tensor:
    """Linear-angular attention plus the local convolution, as `linear_angular_packed`; see `usable`.

    Args:
        qkv: packed projection, (B, N, 3 * C), float32 on the CPU; N counts prefix tokens, which come first.
        weight: of the convolution on the map, (C, 1, k, k), or None for none.
        num_heads: heads H.
        hw: height and width of the map.
        normalizer: `"l2"` or `"kernel"`.

    Returns:
        Merged heads, (B, N, C).
    """
    weight = None if weight is None else weight.contiguous()
    out: Tensor = torch.ops.castling_det.linear_angular(qkv.contiguous(), weight, num_heads, *hw, normalizer == "l2")
    return out


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "castling_det"


def _registered() -> bool:
    return hasattr(torch.ops.castling_det, "linear_angular")


def _compile(compiler: str, out: Path) -> None:
    root = Path(torch.__file__).parent
    headers = root / "include", root / "include" / "torch" / "csrc" / "api" / "include"
    command = [
        *shlex.split(compiler),
        *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-DAT_PER_OPERATOR_HEADERS"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(part for path in headers for part in ("-isystem", str(path))),
        *(str(_SOURCE), "-o", str(out)),
        *(f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise OSError(f"compiler {compiler}: cannot be run ({error.strerror}); set CXX to a C++ compiler") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-10:])
        raise OSError(f"compiler {compiler}: exit code {done.returncode}; g++ 11 or newer is expected\n{tail}")


def _check() -> None:
    """A kernel that this compiler got wrong is not kept."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 65 + 8 * 9, 3 * 64, generator=generator, dtype=torch.float64)
    q, k, v = qkv.view(2, -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
    found = linear_angular(qkv.float(), None, 2, (8, 9), "l2").view(2, -1, 2, 32).transpose(1, 2)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    total = v / 2 + (q @ (k.transpose(-2, -1) @ v)) / math.pi
    error = (found - total / total.norm(dim=-1, keepdim=True)).abs().max().item()
    if not error <= _TOLERANCE:
        raise OSError(f"the compiled kernel is off by {error:.1e}, more than {_TOLERANCE}: it is not used")


def _instructions() -> str:
    """What the processor can do: a kernel for another one would stop with an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
