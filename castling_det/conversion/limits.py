"""What a checkpoint may ask of the machine: no more than its own bytes hold.

A file of a kilobyte can declare a terabyte, as a compressed record, as a tensor whose rows are all the same memory, or
as a list that holds itself. Reading such a file succeeds; the first copy of what was read takes the machine down. So
the sizes that a file declares are compared with its size on disk, before and after reading.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MAX_DEPTH", "MAX_ENTRIES", "check_archive", "check_content", "not_finite", "other_kinds"]

MAX_DEPTH = 100
"""Containers inside one another; a Runner's checkpoint has about ten."""
MAX_ENTRIES = 10_000_000
"""Entries that writing out the content would visit, shared ones each time they are referred to."""


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuses records that unpack to more than the file holds.

    `torch.save` stores its records as they are, so compressed or overlapping ones are no checkpoint's.

    Raises:
        ValueError: names the record.
    """
    size, declared = path.stat().st_size, 0
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"checkpoint {path}: its record {record.filename!r:.200} is compressed ({record.compress_size} bytes "
                f"that declare {record.file_size}), which torch.save never does; unpack it, and save it with torch.save"
            )
        declared += record.file_size
    if declared > size:
        raise ValueError(
            f"checkpoint {path}: its records declare {declared} bytes in a file of {size}; copy or download it again"
        )


def check_content(content: Any, path: Path) -> None:
    """Refuses content that is small in the file and large or endless outside of it.

    Raises:
        ValueError: names the entry and what it declares.
    """
    _Walk(path, path.stat().st_size).visit(content, "")


def other_kinds(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Those of `tensors` whose numbers are of another kind than the model's: casting them would lose their meaning.

    float16 for float32 is of one kind; int8 for float32 is not, nor complex for float.
    """
    return [
        f"{name} {_short(value.dtype)} for {_short(target[name].dtype)}"
        for name, value in tensors.items()
        if name in target and _kind(value) != _kind(target[name])
    ]


def not_finite(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Names of `tensors` that hold NaN or infinity in the model's precision."""
    return [
        name
        for name, value in tensors.items()
        if name in target and value.is_floating_point() and not value.to(target[name].dtype).isfinite().all()
    ]


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized or tensor.dtype == torch.bool:
        return _short(tensor.dtype)
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Walk:
    """Visits every container once; what it has learned of one is kept by identity."""

    def __init__(self, path: Path, bytes_of_file: int) -> None:
        self.path = path
        self.bytes_of_file = bytes_of_file
        self.known: dict[int, tuple[int, int]] = {}
        """Entries and depth of a container that was seen whole."""

    def visit(self, value: Any, name: str, depth: int = 0) -> tuple[int, int]:
        """Entries and depth of `value`, which lies `depth` containers deep under the entry `name`."""
        if isinstance(value, Tensor):
            self._check_tensor(value, name)
            return 1, 0
        if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            return 1, 0
        known = self.known.get(id(value))
        if known is None:
            known = self._visit_children(value, name, depth)
        if depth + known[1] > MAX_DEPTH:
            raise self._error(name, f"holds containers more than {MAX_DEPTH} deep")
        return known

    def _visit_children(self, value: Any, name: str, depth: int) -> tuple[int, int]:
        if depth >= MAX_DEPTH:  # a container that holds itself ends here too
            raise self._error(name, f"holds containers more than {MAX_DEPTH} deep, or itself")
        entries, height = 1, 0
        for key, child in self._children(value):
            more, deeper = self.visit(child, f"{name}.{key!s:.60}" if name else f"{key!s:.60}", depth + 1)
            entries, height = entries + more, max(height, deeper)
            if entries > MAX_ENTRIES:
                raise self._error(name, f"unfolds to more than {MAX_ENTRIES} entries")
        self.known[id(value)] = entries, height + 1
        return self.known[id(value)]

    @staticmethod
    def _children(value: Any) -> Iterable[tuple[Any, Any]]:
        return value.items() if isinstance(value, Mapping) else enumerate(value)

    def _check_tensor(self, tensor: Tensor, name: str) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
            raise self._error(name, f"is a {type(tensor).__name__} of layout {tensor.layout}, no plain tensor")
        if tensor.device.type != "cpu":
            raise self._error(name, f"is a tensor without values (on the device {tensor.device})")
        needed = tensor.numel() * tensor.element_size()
        if needed > self.bytes_of_file:
            raise self._error(
                name, f"declares shape {tuple(tensor.shape)}, {needed} bytes, in a file of {self.bytes_of_file}"
            )

    def _error(self, name: str, what: str) -> ValueError:
        where = ".".join(name.split(".")[:12])
        return ValueError(f"checkpoint {self.path}: entry {where!r} {what}; nothing was used. Get the file again")
