"""Reads what `torch.save` wrote, without Python's unpickler.

A pickle is a program that may call any function. This reader knows the few instructions that `torch.save` writes and
calls nothing but the functions below: a result holds containers, text, numbers and tensors only. Limits keep a small
file from costing much memory or time.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["MAX_DEPTH", "MAX_ENTRIES", "MAX_STEPS", "UnsafePickle", "read_torch_file"]

MAX_STEPS = 1_000_000
"""Instructions of one pickle. A training checkpoint of a large detector has about 100,000."""
MAX_ENTRIES = 1_000_000
"""Entries of all containers; a container that is referred to twice counts twice."""
MAX_DEPTH = 100
"""Containers inside one another; a training checkpoint has about ten."""

_LITERALS = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_NUMBERS = frozenset(np.dtype(code).str[1:] for code in "?bBhHiIlLqQefd")
_ALIKE = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
_OTHERS = {"Char": torch.int8, "Byte": torch.uint8, "ComplexFloat": torch.cfloat, "ComplexDouble": torch.cdouble}
_DTYPES = {name: getattr(torch, name.lower()) for name in _ALIKE} | _OTHERS
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}


class UnsafePickle(ValueError):
    """The pickle asks for a function or a class that this reader does not know."""


@dataclass
class _Global:
    """A function or class that a pickle names."""

    name: str


@dataclass
class _Late:
    """An object that a pickle makes first and fills later: a numpy `dtype`, an `array` or a logged `curve`."""

    kind: str
    value: Any = None

    def fill(self, reader: _Reader, state: Any) -> None:
        """Takes the state that the pickle gives. A curve drops it: nobody needs the curves of a checkpoint."""
        if self.kind == "dtype" and state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])
        elif self.kind == "array":
            _, shape, dtype, fortran, data = state
            reader.spend(len(data))
            flat = np.frombuffer(data, dtype.value) if data else np.empty(0, dtype.value)
            native = flat.astype(dtype.value.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")
            self.value = torch.from_numpy(np.ascontiguousarray(native))


class _Reader:
    """Runs one pickle after the other of a file of `size` bytes; all share the limit on bytes.

    `storage` gives the bytes of a storage, (n,), from its key and its number of bytes.
    """

    def __init__(self, size: int, storage: Callable[[str, int], Tensor]) -> None:
        self.size = size
        self.bytes_left = 2 * size
        self.storage = storage

    def load(self, file: BinaryIO) -> Any:
        """The value of the pickle that starts where `file` stands."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step >= MAX_STEPS:
                raise ValueError(f"its pickle has more than {MAX_STEPS} instructions")
            self._run(opcode.name, argument)
        (value,) = self.stack
        self.entries_left = MAX_ENTRIES
        return self._finished(value, 0)

    def spend(self, count: int) -> None:
        """Counts bytes that are made beyond the pickle's own text."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ValueError(f"its content takes more than twice the {self.size} bytes of the file")

    def _run(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "STOP":
                pass
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case _ if name in _LITERALS:
                stack.append(argument)
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._popped(self.marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._popped(-int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self._popped(self.marks.pop() if name == "APPENDS" else -1)
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._popped(self.marks.pop() if name == "SETITEMS" else -2)
                stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                known = argument.replace("__builtin__", "builtins").replace(" ", ".")
                if known not in _CALLS and known not in _STORAGES:
                    raise UnsafePickle(known)
                stack.append(_Global(known))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._popped(-2)
                stack.append(_CALLS[function.name](self, *arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Late):
                    stack[-1].fill(self, state)  # the attributes of anything else are not needed
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case _:
                raise ValueError(f"its pickle has the instruction {name}, which torch.save does not write")

    def _popped(self, start: int) -> list[Any]:
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _storage(self, _: Any, kind: _Global, key: Any, location: Any, count: int, view: Any = None) -> Tensor:
        if view is not None:
            raise ValueError("a storage that is a part of another; save the file again with a newer torch")
        dtype = _STORAGES[kind.name]
        return self.storage(str(key), count * dtype.itemsize).view(dtype)

    def _finished(self, value: Any, depth: int) -> Any:
        """A copy of `value` with late values in their places, if it keeps the limits on depth and entries."""
        if isinstance(value, _Late):
            return value.value if value.kind == "array" else None
        if isinstance(value, _Global):
            return value.name
        if not isinstance(value, (dict, list, tuple)):
            return value
        self.entries_left -= len(value)
        if self.entries_left < 0:
            raise ValueError(f"its content unfolds to more than {MAX_ENTRIES} entries")
        if depth >= MAX_DEPTH:
            raise ValueError(f"its content holds containers more than {MAX_DEPTH} deep, or one that holds itself")
        if isinstance(value, dict):
            return {key: self._finished(item, depth + 1) for key, item in value.items()}
        return type(value)([self._finished(item, depth + 1) for item in value])


def _dict(items: Any) -> dict[Any, Any]:
    made = {}
    for key, value in items.items() if isinstance(items, dict) else items:
        # The hash of a deeply nested tuple would end the process.
        if not isinstance(key, (str, int, float, type(None))):
            raise ValueError(f"its pickle has a dict with a {type(key).__name__} as key; expected text or numbers")
        made[key] = value
    return made


def _sequence(reader: _Reader, items: Any = ()) -> list[Any]:
    reader.spend(8 * len(items))
    return list(items)


def _encoded(reader: _Reader, text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"its pickle has bytes in the encoding {encoding!r:.40}")
    reader.spend(len(text))
    return text.encode("latin1")


def _method_name(_: _Reader, owner: Any, name: str) -> str:
    # A HistoryBuffer is pickled with `getattr(HistoryBuffer, "mean")`.
    if not isinstance(owner, _Global) or not owner.name.endswith("HistoryBuffer"):
        raise UnsafePickle("builtins.getattr")
    return name


def _no_array(_: _Reader, *arguments: Any) -> None:
    raise ValueError("it has a numpy array without values")


def _tensor(reader: _Reader, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise ValueError(f"it has a tensor of shape {size!r:.80} and strides {stride!r:.80}")
    count = math.prod(size)
    if (needed := count * storage.element_size()) > reader.size:
        raise ValueError(f"it declares a tensor of shape {tuple(size)}, {needed} bytes, in a file of {reader.size}")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if count and last >= len(storage):
        raise ValueError(f"it declares a tensor of shape {tuple(size)} in a storage of {len(storage)} numbers")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _number_type(_: _Reader, code: Any, *options: Any) -> _Late:
    text = code.decode("ascii") if isinstance(code, bytes) else code
    if not isinstance(text, str) or text.lstrip("<>|=") not in _NUMBERS:
        raise ValueError(f"it has a numpy dtype {text!r:.40}; expected a number type")
    return _Late("dtype", np.dtype(text))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda _, items=(): _dict(items),
    "collections.Counter": lambda _, items=(): _dict(items),
    "builtins.set": _sequence,
    "builtins.bytes": lambda _: b"",
    "builtins.getattr": _method_name,
    "_codecs.encode": _encoded,
    "torch.Size": _sequence,
    "torch.device": lambda _, *names: ":".join(map(str, names[:2])),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda _, data, *options: data,
    "mmengine.logging.history_buffer.HistoryBuffer": lambda _, *arguments: _Late("curve"),
    "numpy.dtype": _number_type,
    "numpy.ndarray": _no_array,
}
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the names that numpy 1 and 2 write
    _CALLS[f"{_core}._reconstruct"] = lambda _, *arguments: _Late("array")
    _CALLS[f"{_core}.scalar"] = lambda _, dtype, data: np.frombuffer(data, dtype.value)[0].item()


def read_torch_file(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, in its zip format or in the format before it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _read_archive(zipfile.ZipFile(file), size) if zipped else _read_legacy(file, size)


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    listed = archive.infolist()
    records = {record.filename.partition("/")[2]: record for record in listed}
    if "data.pkl" not in records:
        raise ValueError("it is no checkpoint but another zip archive (no data.pkl in it)")
    if "constants.pkl" in records:
        raise ValueError("it is a TorchScript program; give the checkpoint it was made from")
    # torch.save stores its records as they are, one behind the other.
    if compressed := [record.filename for record in listed if record.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"its record {compressed[0]!r:.200} is compressed, which torch.save never does")
    if (declared := sum(record.file_size for record in listed)) > size:
        raise ValueError(f"its records declare {declared} bytes in a file of {size}")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise ValueError("its numbers are big-endian; save it again on a little-endian machine")
    loaded: dict[str, Tensor] = {}

    def storage(key: str, count: int) -> Tensor:
        if key not in loaded:
            loaded[key] = _from_bytes(archive.read(records[f"data/{key}"]))
        if len(loaded[key]) != count:
            raise ValueError(f"its storage {key:.40} has {len(loaded[key])} bytes instead of {count}")
        return loaded[key]

    return _Reader(size, storage).load(io.BytesIO(archive.read(records["data.pkl"])))


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Five pickles, then the storages: tensors are made before their bytes are read."""
    storages: dict[str, Tensor] = {}

    def storage(key: str, count: int) -> Tensor:
        if key not in storages:
            reader.spend(count)
            storages[key] = torch.zeros(count, dtype=torch.uint8)
        return storages[key]

    reader = _Reader(size, storage)
    if reader.load(file) != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle that torch.save did not write")
    reader.load(file), reader.load(file)  # version of the format, and the machine that wrote it
    content, keys = reader.load(file), list(map(str, reader.load(file)))
    if sorted(keys) != sorted(storages):
        raise ValueError("its tensors need other storages than it has")
    for key in keys:
        file.read(8)  # the number of elements, which the pickle has given
        storages[key].copy_(_from_bytes(file.read(len(storages[key]))))
    return content


def _from_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
