"""Checkpoint files that are built to harm: what a test or the fuzz starts from."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from typing import Any

import torch

__all__ = ["Calls", "overlapping_zip", "rezipped", "safetensors_bytes", "saved", "second_directory", "with_pickle"]


class Calls:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def saved(content: Any, *, zipped: bool = True) -> bytes:
    """What `torch.save` writes, in the new format or the old one."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def rezipped(checkpoint: bytes, replaced: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The zip archive with other contents of the records whose names end with the keys of `replaced`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            content = next((value for key, value in replaced.items() if name.endswith(key)), old.read(name))
            new.writestr(name, content)
    return buffer.getvalue()


def with_pickle(content: Any) -> bytes:
    """A zip checkpoint whose `data.pkl` is any pickle, tensors excepted."""
    return rezipped(saved({}), {"data.pkl": pickle.dumps(content, protocol=2)})


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, as JSON or as it is; `length` is what the file says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def overlapping_zip(times: int) -> bytes:
    """An archive whose central directory names the same stored record `times` times."""
    content = saved({"w": torch.zeros(25_000)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (info,) = (record for record in archive.infolist() if record.filename.endswith("data/0"))
    end = content.rindex(b"PK\x05\x06")
    entries, size, start = struct.unpack("<HLL", content[end + 10 : end + 20])
    directory = content[start : start + size]
    name = info.filename.encode()
    crc = zlib.crc32(b"\0" * 100_000)
    more = b"".join(
        struct.pack(
            "<4s4B4HL2L5H2L",
            b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, crc, info.file_size, info.file_size,
            len(name) + 6, 0, 0, 0, 0, 0, info.header_offset,
        )
        + name
        + f"{number:06d}".encode()
        for number in range(times)
    )  # fmt: skip
    count = min(entries + times, 0xFFFF)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size + len(more), start, 0)
    return content[:start] + directory + more + tail


def second_directory(checkpoint: bytes, size: int = 10**9) -> bytes:
    """The archive with a zip64 directory behind its own, of `size` bytes by its own words."""
    end = checkpoint.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return checkpoint[:end] + record + locator + tail
