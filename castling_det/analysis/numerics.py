"""What low precision costs the attention, on the inputs that break formulas: errors against float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castling_det.ops import NORMALIZERS, linear_angular_packed, masked_softmax_packed
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table

__all__ = [
    "INPUTS",
    "NumericsReport",
    "NumericsRow",
    "measure_numerics",
    "numerics_markdown",
    "read_numerics",
    "write_numerics",
]

SCHEMA = "castling_det.numerics/1"

_BATCH, _NUM_HEADS, _HEAD_DIM = 2, 2, 64

_THRESHOLD = 1.2
"""Of a uniform row's probability, which every zero query has exactly: at 1 rounding would decide about it."""

_HYBRID_TOKENS = 4096
"""Longest sequence of the hybrid: its float64 twin takes a minute there."""


def _shared_mean(qkv: Tensor) -> Tensor:
    """Tokens of a flat region: all alike but for a tenth. The published sum then grows with N."""
    return qkv * 0.1 + 2.0


def _zero_tokens(qkv: Tensor) -> Tensor:
    """Every tenth token is zero in q, k and v."""
    qkv[:, ::10] = 0
    return qkv


def _padded(qkv: Tensor) -> Tensor:
    """The second image fills a third of the batch's length, the rest is zero."""
    qkv[1, qkv.shape[1] // 3 :] = 0
    return qkv


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda qkv: qkv,
    "shared mean": _shared_mean,
    "zero tokens": _zero_tokens,
    "padded": _padded,
}
"""Name and what is done to standard normal q, k, v, (B, N, 3, H, K)."""


@dataclass(frozen=True)
class NumericsRow:
    """One dtype on one kind of input.

    `branch` is `"linear"`, or `"hybrid"` with a mask that keeps what is above 1.2 times a uniform row's probability.
    `out_rms` and `grad_rms` are the RMS of the error against float64 over the RMS of the reference, of the output and
    of the gradient of q, k and v; both take the inputs as rounded to the dtype. None where `finite` is false.
    """

    dtype: str
    branch: str
    normalizer: str
    tokens: int
    inputs: str
    finite: bool
    out_rms: float | None
    grad_rms: float | None


@dataclass(frozen=True)
class NumericsReport:
    """All rows of a run, in the order measured."""

    machine: Machine
    created_by: str
    rows: tuple[NumericsRow, ...]


def measure_numerics(
    *,
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    created_by: str,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> NumericsReport:
    """Every combination of branch, normaliser, length, kind of input and dtype.

    Args:
        tokens: lengths N of the sequence. The hybrid is measured up to 4096.
        dtypes: floating-point types.
        created_by: the command, for the record.
        device: `"cpu"` or `"cuda"`.
        progress: called before each reference is computed, with what it is of.
    """
    rows: list[NumericsRow] = []
    for branch, normalizer, length, inputs in itertools.product(("linear", "hybrid"), NORMALIZERS, tokens, INPUTS):
        if branch == "hybrid" and length > _HYBRID_TOKENS:
            continue
        if progress is not None:
            progress(f"{branch} {normalizer} N={length} {inputs}")
        rows += _rows(branch, normalizer, length, inputs, dtypes, device)
    return NumericsReport(this_machine(), created_by, tuple(rows))


def _rows(
    branch: str, normalizer: str, tokens: int, inputs: str, dtypes: Sequence[torch.dtype], device: str
) -> Iterator[NumericsRow]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (_BATCH, tokens, 3, _NUM_HEADS, _HEAD_DIM)
    qkv = INPUTS[inputs](torch.randn(shape, generator=generator, dtype=torch.float64)).to(device)
    grad = torch.randn((_BATCH, tokens, _NUM_HEADS, _HEAD_DIM), generator=generator, dtype=torch.float64).to(device)
    for dtype in dtypes:
        # What the dtype makes of inputs and gradient is no error of the attention: the reference takes it too.
        rounded, rounded_grad = qkv.to(dtype), grad.to(dtype)
        actual = _output_and_gradient(rounded, rounded_grad, branch, normalizer)
        exact = _output_and_gradient(rounded.double(), rounded_grad.double(), branch, normalizer)
        finite = all(bool(x.isfinite().all()) for x in actual)
        out_rms, grad_rms = (_relative_rms(*pair) for pair in zip(actual, exact, strict=True))
        yield NumericsRow(
            dtype=str(dtype).removeprefix("torch."),
            branch=branch,
            normalizer=normalizer,
            tokens=tokens,
            inputs=inputs,
            finite=finite,
            out_rms=out_rms if finite else None,
            grad_rms=grad_rms if finite else None,
        )


def _output_and_gradient(qkv: Tensor, grad: Tensor, branch: str, normalizer: str) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    aux = None
    if branch == "hybrid":
        aux = masked_softmax_packed(qkv, _THRESHOLD / qkv.shape[1])
    out = linear_angular_packed(qkv, normalizer=normalizer, aux=aux)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    return out.detach(), gradient


def _relative_rms(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def write_numerics(path: str | os.PathLike[str], report: NumericsReport) -> None:
    """Writes the record as JSON."""
    write_document(path, report, schema=SCHEMA, field="numerics")


def read_numerics(path: str | os.PathLike[str]) -> NumericsReport:
    """Reads what `write_numerics` wrote.

    Raises:
        ValueError: not such a file; names it and the fix.
    """
    return read_document(path, NumericsReport, schema=SCHEMA, field="numerics", fix="run tools/numerics.py again")


def numerics_markdown(report: NumericsReport) -> str:
    """The largest error over kinds of input and normalisers, for each branch, dtype and length."""
    groups: dict[tuple[str, str, int], list[NumericsRow]] = {}
    for row in report.rows:
        groups.setdefault((row.branch, row.dtype, row.tokens), []).append(row)
    body = []
    for (branch, dtype, tokens), rows in groups.items():
        broken = [row.inputs for row in rows if not row.finite]
        finite = "yes" if not broken else "NO: " + ", ".join(dict.fromkeys(broken))
        body.append([f"{branch}, {dtype}", str(tokens), finite, _worst(rows, "out_rms"), _worst(rows, "grad_rms")])
    table = markdown_table(["branch", "N", "finite", "output: RMS error", "gradient: RMS error"], body)
    explained = (
        f"Worst over the inputs {', '.join(INPUTS)} and both normalisers; errors against float64 on the same rounded "
        "inputs, relative to the RMS of the reference."
    )
    return "\n".join([*table, "", explained]) + "\n"


def _worst(rows: Sequence[NumericsRow], name: str) -> str:
    values = [getattr(row, name) for row in rows]
    return "-" if None in values else f"{max(values):.1e}"
