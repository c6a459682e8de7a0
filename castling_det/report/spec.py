"""Where a run lies, and its form on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from castling_det.report.work_dir import PREDICTIONS, metrics_files

__all__ = ["RunSpec"]

_KEYS = ("test", "train", "config", "checkpoint", "predictions", "seed")
_FORM = f"NAME=PATH[,KEY=VALUE...], PATH a work dir, a checkpoint.pth or a predictions.json, KEY of {', '.join(_KEYS)}"


@dataclass(frozen=True)
class RunSpec:
    """One run. What is None is found from the rest.

    `work_dir` is its training work dir, the folder of a checkpoint, or a test work dir; None for a run of which only
    predictions are at hand. `test_dir` is the one that tools/test.py was given. `train_dir` holds the scalars of the
    training: if None, `work_dir`, or for a converted checkpoint the folder of the one that its manifest names.
    `config`, `checkpoint` and `seed` are read from what the tools dumped. `predictions` is a COCO results file.
    """

    name: str
    work_dir: Path | None
    test_dir: Path | None = None
    train_dir: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    seed: int | None = None
    predictions: Path | None = None

    @property
    def test(self) -> Path | None:
        """The test work dir: the told one, `work_dir/test`, or `work_dir` if the test, as by default, wrote there."""
        if self.test_dir is not None or self.work_dir is None:
            return self.test_dir
        inside = self.work_dir / "test"
        return self.work_dir if not inside.is_dir() and metrics_files(self.work_dir) else inside

    @property
    def predictions_file(self) -> Path | None:
        """The results file: the told one, or the one in the test work dir; None if there is none or are several."""
        if self.predictions is not None or self.test is None:
            return self.predictions
        usual = self.test / PREDICTIONS
        found = [usual] if usual.is_file() else sorted(self.test.glob("*.bbox.json"))
        return found[0] if len(found) == 1 else None

    @classmethod
    def parse(cls, text: str) -> RunSpec:
        """From `NAME=PATH[,KEY=VALUE...]`.

        Raises:
            ValueError: not of that form, or an unknown key.
        """
        head, *fields = text.split(",")
        name, equals, place = (part.strip() for part in head.partition("="))
        if not (name and equals and place):
            raise ValueError(f"--run {text!r}: expected {_FORM}")
        found = dict([_field(text, field) for field in fields])
        kind = {".pth": "checkpoint", ".json": "predictions"}.get(Path(place).suffix)
        if kind is not None:
            fields.append(f"{kind}={place}")
            found[kind] = place
        if len(found) < len(fields):
            raise ValueError(f"--run {text!r}: a key is given twice; expected {_FORM}, each once")
        seed = found.pop("seed", None)
        if seed is not None and not seed.isdecimal():
            raise ValueError(f"--run {text!r}: seed={seed!r}: expected a whole number")
        paths = {key: Path(value) for key, value in found.items()}
        folders = {"checkpoint": Path(place).parent, "predictions": None, None: Path(place)}
        return cls(
            name,
            folders[kind],
            test_dir=paths.get("test"),
            train_dir=paths.get("train"),
            config=paths.get("config"),
            checkpoint=paths.get("checkpoint"),
            seed=int(seed) if seed is not None else None,
            predictions=paths.get("predictions"),
        )


def _field(text: str, field: str) -> tuple[str, str]:
    key, equals, value = field.partition("=")
    if key not in _KEYS or not equals or not value:
        raise ValueError(f"--run {text!r}: field {field!r}: expected {_FORM}, each once")
    return key, value
