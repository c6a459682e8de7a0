"""The machine line of a report."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from castling_det.report.record import Machine

__all__ = ["this_machine"]


def this_machine() -> Machine:
    """Describes the machine and the checkout that this process runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Machine(
        torch=str(torch.__version__),
        device=device,
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        commit=_commit(Path(__file__).parent),
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is in, with `+changes` if files differ from it; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    # An installed wheel may lie in somebody else's repository: ask whether git tracks this very file.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit
