"""Trainings in ranks, each a process of its own; nothing here is a test."""

from __future__ import annotations

import copy
import functools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from castling_det.layers import attention_layers
from tests.distributed.settings import CONFIG, options
from tests.processes import process_context


class Trained(NamedTuple):
    """What a training leaves: the loss of each iteration, the mean over ranks, and what the checkpoint holds."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    mask: dict[str, Any] | None
    kept_by_rank: list[list[float]]
    """By iteration: what this rank's own mask kept in each layer, before any reduction."""


class Watch(Hook):
    """Notes each iteration's loss and mask, before `MaskAnnealingHook` reduces them."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kept: list[list[float]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        assert outputs is not None
        loss = outputs["loss"].detach().clone()
        all_reduce(loss, op="mean")
        self.losses.append(float(loss))
        layers = attention_layers(runner.model, "castling").values()
        self.kept.append([float(layer.mask_stats.kept_fraction) for layer in layers if layer.mask_stats])


@functools.cache
def _config() -> Config:
    """Read once: a base of MMDetection's takes seconds."""
    return Config.fromfile(CONFIG)


def train(folder: Path, *, ranks: int, extra: dict[str, Any] | None = None, **case: Any) -> Trained:
    """Trains in this process, which may be one of several ranks; `extra` is merged into the config last."""
    name = "-".join(map(str, (ranks, *case.values(), *(extra or {}).values())))
    config = copy.deepcopy(_config())
    config.merge_from_dict(options(folder, ranks=ranks, **case) | (extra or {}))
    config.work_dir, config.experiment_name = str(folder / f"work-{name}"), name
    config.visualizer.name = name  # one name is one instance in a process
    config.launcher = "pytorch" if ranks > 1 else "none"
    runner = Runner.from_cfg(config)
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    checkpoint = torch.load(folder / f"work-{name}" / "iter_6.pth", weights_only=False) if get_rank() == 0 else {}
    return Trained(
        watch.losses,
        checkpoint.get("state_dict", {}),
        checkpoint.get("meta", {}).get("castling_det", {}).get("mask"),
        watch.kept,
    )


def _rank(rank: int, ranks: int, port: int, folder: Path, cases: Sequence[dict[str, Any]]) -> None:
    import tests.distributed.dies  # noqa: F401  (ranks without a GPU)

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.save([tuple(train(folder, ranks=ranks, **case)) for case in cases], folder / f"rank{rank}.pth")


def train_in_ranks(folder: Path, cases: Sequence[dict[str, Any]], *, ranks: int) -> list[list[Trained]]:
    """Trains every case in `ranks` processes; the results by rank, then by case."""
    context = process_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, ranks, port, folder, cases)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [
        [Trained(*each) for each in torch.load(folder / f"rank{rank}.pth", weights_only=False)] for rank in range(ranks)
    ]
