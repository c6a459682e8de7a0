"""Checkpoints of a training that are whole or absent, whenever the process is killed.

mmengine's hook deletes the old checkpoint, then writes the new one in place, then `last_checkpoint` in place. Killed in
between, a run with `max_keep_ckpts=1` has nothing left to resume from, or a part of a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from castling_det.files import atomic_write, write_text
from castling_det.registry import HOOKS

__all__ = ["WholeCheckpointHook", "WholeFileBackend"]

BACKEND = "castling_det.whole"


class WholeFileBackend(LocalBackend):
    """mmengine's local files, written to a temporary name, synced and renamed."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes; `filepath` is the old file or the whole new one at any time."""
        with atomic_write(filepath) as temporary:
            temporary.write_bytes(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Writes text in the same way."""
        self.put(obj.encode(encoding), filepath)


register_backend(BACKEND, WholeFileBackend, force=True)


class _RemovesLater:
    """A file backend that only notes what to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.outdated: list[str] = []

    def remove(self, path: str) -> None:
        self.outdated.append(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, with its arguments, in an order that a kill cannot harm.

    The new checkpoint is written to a temporary name, synced and renamed; then `last_checkpoint` names it; the one that
    it replaces is deleted last. Files on other storage than a local disk are left to their own backend.
    """

    # mmengine's, which has no types.
    file_backend: Any
    backend_args: dict[str, Any] | None

    def before_train(self, runner: Runner) -> None:
        """Chooses how files are written, and removes the temporary files of a run that was killed here."""
        super().before_train(runner)
        if not isinstance(self.file_backend, LocalBackend) or self.backend_args is not None:
            return
        self.backend_args = {"backend": BACKEND}
        if is_main_process() and Path(self.out_dir).is_dir():
            for part in Path(self.out_dir).glob(".*.pth.*.part"):
                part.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated = self._outdated(runner, step)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_text(Path(runner.work_dir) / "last_checkpoint", str(self.last_ckpt))
            for path in outdated:
                _remove(self.file_backend, path)

    def _outdated(self, runner: Runner, step: int) -> list[str]:
        """What the checkpoint of `step` replaces; the checkpoint itself already says so."""
        if self.max_keep_ckpts <= 0 or (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            return []
        outdated = []
        if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
        self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        return [self.file_backend.join_path(self.out_dir, name) for name in outdated]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        # mmengine removes the best checkpoint so far before it writes the better one.
        backend = self.file_backend
        self.file_backend = later = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        current = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        for path in later.outdated:
            if path not in current:
                _remove(backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):  # of a sharded training
        backend.rmtree(path)
