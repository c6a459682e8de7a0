"""Where a run lies, and its form on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunSpec"]

_KEYS = ("test", "train", "config", "checkpoint", "seed")
_FORM = "NAME=WORK_DIR[,KEY=VALUE...], KEY one of " + ", ".join(_KEYS)


@dataclass(frozen=True)
class RunSpec:
    """One run. What is None is found from the rest.

    `work_dir` is its training work dir, or the folder of a converted checkpoint. `test_dir` is the one that
    tools/test.py was given, `work_dir/test` if None. `train_dir` holds the scalars of the training: if None,
    `work_dir`, or for a converted checkpoint the folder of the one that its manifest names. `config`, `checkpoint`
    and `seed` are read from what the tools dumped.
    """

    name: str
    work_dir: Path
    test_dir: Path | None = None
    train_dir: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    seed: int | None = None

    @property
    def test(self) -> Path:
        """The test work dir."""
        return self.test_dir or self.work_dir / "test"

    @classmethod
    def parse(cls, text: str) -> RunSpec:
        """From `NAME=WORK_DIR[,KEY=VALUE...]`.

        Raises:
            ValueError: not of that form, or an unknown key.
        """
        head, *fields = text.split(",")
        name, equals, work_dir = head.partition("=")
        if not (name.strip() and equals and work_dir.strip()):
            raise ValueError(f"--run {text!r}: expected {_FORM}")
        found: dict[str, str] = {}
        for field in fields:
            key, equals, value = field.partition("=")
            if key not in _KEYS or not equals or not value or key in found:
                raise ValueError(f"--run {text!r}: field {field!r}: expected {_FORM}, each once")
            found[key] = value
        seed = found.pop("seed", None)
        if seed is not None and not seed.isdecimal():
            raise ValueError(f"--run {text!r}: seed={seed!r}: expected a whole number")
        paths = {key: Path(value) for key, value in found.items()}
        return cls(
            name.strip(),
            Path(work_dir.strip()),
            test_dir=paths.get("test"),
            train_dir=paths.get("train"),
            config=paths.get("config"),
            checkpoint=paths.get("checkpoint"),
            seed=int(seed) if seed is not None else None,
        )
