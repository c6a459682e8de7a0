"""A rank that is killed: the run ends with an error, and resumed ends with the weights of a run that lost none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from castling_det.compat.host import mmdet_tool
from tests.distributed.ranks import train_in_ranks
from tests.distributed.settings import CONFIG, ITERATIONS, ROOT, options, write_data

LIMIT_S = 60


def launch(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What MMDetection's tools/dist_train.sh runs, with two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [mmdet_tool("train.py"), str(config), "--launcher", "pytorch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose second rank dies in the fifth iteration; the last checkpoint before that is of the third."""
    folder = write_data(tmp_path_factory.mktemp("lost_rank"))
    content = Config.fromfile(CONFIG)
    content.merge_from_dict(options(folder, ranks=2))
    content.work_dir = str(folder / "work")
    content.custom_imports = dict(imports=["tests.distributed.dies"])
    content.custom_hooks.append(dict(type="DiesHook", rank=1, before_iteration=4))
    content.dump(folder / "dies.py")
    content.custom_hooks.pop()
    content.dump(folder / "lives.py")
    return folder


@pytest.mark.slow
def test_the_run_ends_and_resumes_to_the_same_weights(config: Path) -> None:
    began = time.time()
    failed = launch(config / "dies.py")
    ended = time.time()
    assert failed.returncode != 0 and "exitcode" in failed.stderr, failed.stderr[-3000:]
    work = config / "work"
    assert (work / "iter_3.pth").is_file() and not (work / f"iter_{ITERATIONS}.pth").exists()
    assert began < ended < max(path.stat().st_mtime for path in work.rglob("*.log")) + LIMIT_S

    resumed = launch(config / "lives.py", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed epoch: 0, iter: 3" in resumed.stdout + resumed.stderr
    ((whole,), _) = train_in_ranks(config, [dict(attention="castling", with_cp=False)], ranks=2)
    found = torch.load(work / f"iter_{ITERATIONS}.pth", weights_only=False)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=0)
    early = torch.load(work / "iter_3.pth", weights_only=False)["state_dict"]
    assert any(not torch.equal(early[name], weight) for name, weight in whole.weights.items())
