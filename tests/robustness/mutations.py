"""Seeded mutations of valid files: bytes, JSON values, the pickle inside of a checkpoint; folders with odd entries."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import struct
import zipfile
from typing import Any

from tests.robustness.hostile_files import rezipped, safetensors_bytes

__all__ = [
    "any_folder",
    "mutated_bytes",
    "mutated_entries",
    "mutated_header",
    "mutated_json",
    "mutated_pickle",
    "mutated_safetensors",
]

_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x2E, 0x28, 0x52, 0x63, 0x7D, 0x5D, 0x51)
_NUMBERS = (0, 1, 255, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, math.nan, math.inf, -math.inf, 1e308, 10**400, -(10**20), 2**63, "", "x", "\0",
    "\ud800", "../../etc/passwd", "/etc/passwd", "C:\\x", "a/../../b", "1", "é" * 40, "x" * 5000, [], {}, [[]],
    [None] * 4, [math.nan] * 4, [1e308] * 4, [10**400] * 4, [-1, -1, -1, -1], [0, 0, 0, 0], {"id": 1}, [{}],
    [[[[[[[]]]]]]],
)  # fmt: skip


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to eight changes: a bit, a byte, a number, a piece that is removed, doubled, moved or cut off."""
    text = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not text:
            break
        start = rng.randrange(len(text))
        length = min(rng.choice((1, 2, 4, 16, 64, 512)), len(text) - start)
        piece = bytes(text[start : start + length])
        match rng.randrange(9):
            case 0:
                text[start] ^= 1 << rng.randrange(8)
            case 1:
                text[start] = rng.choice(_BYTES)
            case 2:
                text[start : start + length] = rng.randbytes(length)
            case 3:
                del text[start : start + length]
            case 4:
                text[start:start] = piece
            case 5:
                place = rng.randrange(len(text))
                text[place:place] = piece
            case 6:
                text = text[:start]
            case 7:
                number = struct.pack("<Q", rng.choice(_NUMBERS))[: rng.choice((2, 4, 8))]
                text[start : start + len(number)] = number
            case 8:
                other = rng.randrange(len(text))
                text[start : start + length] = text[other : other + length]
    return bytes(text)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """One to four values of the tree replaced, removed, doubled, or wrapped deep in lists."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))  # later changes may go into it
            case 3:
                del parent[key]
            case 4:
                other_parent, other_key = rng.choice(places)
                parent[key] = json.loads(json.dumps(other_parent[other_key])) if _holds(other_parent, other_key) else 0
            case 5:
                for _ in range(rng.choice((1, 3, 60))):
                    parent[key] = [parent[key]]
    text = json.dumps(value).encode()
    if rng.random() < 0.05:
        text = text.replace(b"null", b"[" * rng.choice((50, 900, 5000)), 1)
    return text


def _places(value: Any) -> Any:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _holds(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def mutated_pickle(content: bytes, rng: random.Random) -> bytes:
    """A zip checkpoint with a changed pickle or tensor record, and sums that are right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        name = rng.choice([name for name in names if name.endswith("data.pkl")] * 3 + names)
        changed = mutated_bytes(archive.read(name), rng)
    return rezipped(content, {name: changed})


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, whose length is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    mutate = rng.choice((mutated_json, mutated_bytes))
    return safetensors_bytes(mutate(header, rng), data)


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Changes in the first bytes, where an image says what it is."""
    end = rng.choice((16, 32, 64, 256))
    return mutated_bytes(content[:end], rng) + content[end:]


def mutated_entries(content: bytes, rng: random.Random) -> bytes:
    """One to four texts of a JSON object of JSON texts, as ONNX metadata are: changed, replaced or removed."""
    entries = json.loads(content)
    for name in rng.sample(sorted(entries), rng.choice((1, 1, 2, 4))):
        text = entries[name].encode()
        match rng.randrange(6):
            case 0:
                del entries[name]
            case 1:
                entries[name] = json.dumps(rng.choice(HOSTILE_VALUES))
            case 2:
                entries[name] = mutated_bytes(text, rng).decode(errors="replace")
            case _:
                entries[name] = mutated_json(b'[%b]' % text, rng).decode()[1:-1]
    return json.dumps(entries).encode()


_STEMS = (
    "a", "b", "-rf", "[x]", "*", "%s", " ", ".hidden", "a\nb", "\x1b[31m", "\udcff\udcfe", "\N{SNOWMAN}", "x" * 240,
    "a.png", "con\\", "\u202e",
)  # fmt: skip
_SUFFIXES = (".png", ".png", ".JPG", ".tif", ".gif", ".txt", "", ".png.", ".")
_KINDS = ("image", "image", "image", "cut", "empty", "folder", "pipe", "loop", "device", "gone")


def any_folder(content: bytes, rng: random.Random) -> bytes:
    """The names and kinds of one to six entries, as JSON."""
    names = [rng.choice(_STEMS) + rng.choice(_SUFFIXES) for _ in range(rng.randint(1, 6))]
    return json.dumps([(name, rng.choice(_KINDS)) for name in names if name != "."]).encode()
