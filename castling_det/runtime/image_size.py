"""The size that an image's decoder would allocate, from the file's header: a few kilobytes can unpack to gigabytes.

Read as libjpeg, libpng, libtiff, libwebp and OpenCV read it: what they would take for something else is refused here.
"""

from __future__ import annotations

import struct

__all__ = ["declared_hw"]

_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_SEGMENTS = {0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
"""Tables, restart interval, applications' data, comments."""
_MOST_SCANS = 100
"""A progressive JPEG has about ten; each one may cost a pass over all pixels and take a dozen bytes."""


def declared_hw(content: bytes) -> tuple[int, int]:
    """Height and width of a BMP, JPEG, PNG, TIFF (first page) or WebP file; ValueError where there are none."""
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
            height, width = _png_hw(content)
        elif content.startswith(b"\xff\xd8\xff"):
            height, width = _jpeg_hw(content)
        elif content.startswith(b"BM"):
            height, width = _bmp_hw(content)
        elif content[:4] in (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+"):
            height, width = _tiff_hw(content)
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            height, width = _webp_hw(content)
        else:
            raise ValueError("no BMP, JPEG, PNG, TIFF or WebP file")
    except (struct.error, IndexError, KeyError, OverflowError):
        raise ValueError("no size in its header") from None
    return height, width


def _bmp_hw(content: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", content, 14)
    if header != 12 and header < 36:
        raise IndexError
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", content, 18)
    return abs(height), width  # rows may count from the top


def _jpeg_hw(content: bytes) -> tuple[int, int]:
    if content.count(b"\xff\xda") > _MOST_SCANS:
        raise ValueError(f"more than {_MOST_SCANS} scans")
    at = 2
    while content[at] == 0xFF:
        while content[at] == 0xFF:  # a marker may follow any number of these
            at += 1
        marker, length = struct.unpack_from(">BH", content, at)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, at + 4)
            return height, width
        if marker not in _JPEG_SEGMENTS:
            break
        at += 1 + max(length, 2)
    raise IndexError


def _png_hw(content: bytes) -> tuple[int, int]:
    at, kind = 8, b""
    while kind != b"IEND":  # OpenCV makes room for a chunk before it looks for its bytes
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind in (b"acTL", b"fcTL", b"fdAT"):  # a damaged one ends the process in OpenCV 4.12
            raise ValueError("an animation")
        at += 12 + length
    if at > len(content):
        raise IndexError
    width, height = struct.unpack_from(">II", content, 16)
    return height, width


def _tiff_hw(content: bytes) -> tuple[int, int]:
    """Of the first page or of one of its tiles, whichever is larger, in TIFF or BigTIFF."""
    order = "<" if content.startswith(b"II") else ">"
    (version,) = struct.unpack_from(order + "H", content, 2)
    start, count, entry, value, length = {42: ("4xI", "H", "HHI", 8, 12), 43: ("8xQ", "Q", "HHQ", 12, 20)}[version]
    forms = {1: "B", 3: "H", 4: "I", **({16: "Q"} if version == 43 else {})}
    (at,) = struct.unpack_from(order + start, content)
    (entries,) = struct.unpack_from(order + count, content, at)
    at += struct.calcsize(order + count)
    found = {256: 0, 257: 0, 258: 1, 322: 0, 323: 0}  # width, height, bits, width and height of a tile
    for place in range(at, at + min(entries, 4096) * length, length):
        tag, kind, number = struct.unpack_from(order + entry, content, place)
        if tag in found:
            form = order + forms[kind]
            where = place + value
            if number * struct.calcsize(form) > length - value:  # bits of several channels, elsewhere in the file
                (where,) = struct.unpack_from(order + ("I" if version == 42 else "Q"), content, where)
            found[tag] = max(found[tag], *struct.unpack_from(form, content, where))
    if found[258] > 16:
        raise ValueError(f"{found[258]} bits a channel, expected at most 16")
    return max((found[257], found[256]), (found[323], found[322]), key=lambda hw: hw[0] * hw[1])


def _webp_hw(content: bytes) -> tuple[int, int]:
    match content[12:16]:
        case b"VP8X":  # extended: two numbers of 24 bits
            width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
        case b"VP8L":  # lossless: two numbers of 14 bits
            (bits,) = struct.unpack_from("<I", content, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        case _:
            raise IndexError
    return height, width
