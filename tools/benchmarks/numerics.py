"""Measures what low precision costs the attention on inputs that break formulas: errors against float64.

  tools/benchmarks/numerics.py --out results/attention/numerics.json

Exit code: 0, or 1 if a result is not finite.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from castling_det.ops import NORMALIZERS, linear_angular_packed, masked_softmax_packed
from castling_det.report.records import Machine, read_document, this_machine, write_document
from castling_det.report.render import markdown_table

SCHEMA = "castling_det.numerics/1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPE = (2, 2, 64)
"""Images, heads and channels of a head."""
THRESHOLD = 1.2
"""Times the probability of a uniform row, which every zero query has exactly: at 1 rounding would decide about it."""
HYBRID_TOKENS = 4096
"""Longest sequence of the hybrid: the same in float64 takes a minute there."""


def _zero_tokens(qkv: Tensor) -> Tensor:
    qkv[:, ::10] = 0
    return qkv


def _padded(qkv: Tensor) -> Tensor:
    """The second image fills a third of the batch's length, the rest is zero."""
    qkv[1, qkv.shape[1] // 3 :] = 0
    return qkv


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda qkv: qkv,
    # Tokens of a flat region: the published sum then grows with N.
    "shared mean": lambda qkv: qkv * 0.1 + 2.0,
    "zero tokens": _zero_tokens,
    "padded": _padded,
}
"""What is done to standard normal q, k, v, (B, N, 3, H, K)."""


@dataclass(frozen=True)
class NumericsRow:
    """RMS of the errors over the RMS of the reference, of the output and of the gradient of q, k and v.

    The reference takes the inputs as rounded to `dtype`. Errors are None where `finite` is false.
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


def measured(case: tuple[str, str, int, str], dtypes: Sequence[str], device: str) -> Iterator[NumericsRow]:
    """A row for each dtype; `case` is branch, normaliser, tokens and the name of the inputs."""
    branch, normalizer, tokens, inputs = case
    generator = torch.Generator().manual_seed(tokens)
    batch, heads, channels = SHAPE
    draw = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
            for shape in ((batch, tokens, 3, heads, channels), (batch, tokens, heads, channels)))  # fmt: skip
    qkv, grad = INPUTS[inputs](next(draw)), next(draw)
    for name in dtypes:
        x, cotangent = qkv.to(DTYPES[name]), grad.to(DTYPES[name])
        actual = _output_and_gradient(x, cotangent, branch, normalizer)
        exact = _output_and_gradient(x.double(), cotangent.double(), branch, normalizer)
        finite = all(bool(value.isfinite().all()) for value in actual)
        out_rms, grad_rms = (
            float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt()) if finite else None
            for a, e in zip(actual, exact, strict=True)
        )
        yield NumericsRow(name, branch, normalizer, tokens, inputs, finite, out_rms, grad_rms)


def _output_and_gradient(qkv: Tensor, grad: Tensor, branch: str, normalizer: str) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    aux = masked_softmax_packed(qkv, THRESHOLD / qkv.shape[1]) if branch == "hybrid" else None
    out = linear_angular_packed(qkv, normalizer=normalizer, aux=aux)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def read_numerics(path: Path) -> NumericsReport:
    """Reads the record; raises ValueError for another file."""
    return read_document(path, NumericsReport, schema=SCHEMA, field="numerics", fix="run numerics.py again")


def numerics_markdown(report: NumericsReport) -> str:
    """The largest error over kinds of input and normalisers, for each branch, dtype and length."""
    groups: dict[tuple[str, str, int], list[NumericsRow]] = {}
    for row in report.rows:
        groups.setdefault((row.branch, row.dtype, row.tokens), []).append(row)
    body = []
    for (branch, dtype, tokens), rows in groups.items():
        broken = dict.fromkeys(row.inputs for row in rows if not row.finite)
        errors = [[getattr(row, name) for row in rows] for name in ("out_rms", "grad_rms")]
        worst = ["-" if None in values else f"{max(values):.1e}" for values in errors]
        body.append([f"{branch}, {dtype}", str(tokens), f"NO: {', '.join(broken)}" if broken else "yes", *worst])
    table = markdown_table(["branch", "N", "finite", "output: RMS error", "gradient: RMS error"], body)
    explained = (
        f"Worst over the inputs {', '.join(INPUTS)} and both normalisers; errors against float64 on the same rounded "
        "inputs, relative to the RMS of the reference."
    )
    return "\n".join([*table, "", explained, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON record")
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 1024, 4096, 16384], help="lengths N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(arguments)
    cases = [
        case
        for case in itertools.product(("linear", "hybrid"), NORMALIZERS, args.tokens, INPUTS)
        if case[0] == "linear" or case[2] <= HYBRID_TOKENS
    ]
    shown = track(cases, "numerics", console=Console(stderr=True), transient=True)
    rows = tuple(row for case in shown for row in measured(case, args.dtypes, args.device))
    command = ["tools/benchmarks/numerics.py", *(sys.argv[1:] if arguments is None else arguments)]
    report = NumericsReport(this_machine(), shlex.join(command), rows)
    write_document(args.out, report, schema=SCHEMA, field="numerics")
    print(numerics_markdown(report))
    return 0 if all(row.finite for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
