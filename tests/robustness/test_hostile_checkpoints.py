"""Checkpoints that are built to harm are refused by name: none runs code, none takes more than its own size."""

from __future__ import annotations

import codecs
import io
import os
import pickle
import resource
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from castling_det.conversion import load_checkpoint, load_pretrained, select_weights
from castling_det.models import CastlingViT
from tests.robustness.hostile_files import (
    Calls,
    overlapping_zip,
    rezipped,
    safetensors_bytes,
    saved,
    second_directory,
    with_pickle,
)

WEIGHTS = {"w": torch.arange(16.0)}


def _declaring(elements: int) -> bytes:
    """A tensor of 16 floats whose pickle says that it has more."""
    # The storage's count stands before its TUPLE.
    return _edited(b"K\x10tq", _long(elements) + b"tq", _edited(b"K\x10\x85", _long(elements) + b"\x85"))


def _long(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little")


def _edited(old: bytes, new: bytes, whole: bytes | None = None) -> bytes:
    whole = whole or saved(WEIGHTS)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        text = archive.read(name)
    assert old in text
    return rezipped(whole, {"data.pkl": text.replace(old, new)})


def _shape_only(elements: int) -> bytes:
    """The storage is as large as it says, the tensor's shape is not."""
    return _edited(b"K\x10\x85", _long(elements) + b"\x85")


def _nested(depth: int, times: int = 1) -> list[Any]:
    """Lists in one another, each of which holds the next `times` times."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value] * times
    return value


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


def _of_instructions(text: bytes) -> bytes:
    return rezipped(saved({}), {"data.pkl": b"\x80\x02" + text + b"."})


def _encodings(times: int, length: int) -> bytes:
    text = b"X" + length.to_bytes(4, "little") + b"x" * length
    call = b"c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01"
    return _of_instructions(b"](" + call + b"h\x00h\x01R" * times + b"e")


class _Array:
    """An array with any state."""

    def __init__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


class _NumberType(_Array):
    """A dtype with any state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f8", False, True), self.state


HEADER: dict[str, Any] = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}

# What it is: the file, what the refusal says.
REFUSED: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a compressed record of 100 MB in 100 KB": (
        lambda: rezipped(saved(WEIGHTS), {"data/0": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED),
        r"record 'archive/data\.pkl' is compressed",
    ),
    "one record that 10,000 names share": (overlapping_zip(10_000), r"records declare 1000\d+ bytes in a file of"),
    "a second directory, of 1 GB": (second_directory(saved(WEIGHTS)), "truncated or damaged"),
    "a record shorter than its tensor": (_declaring(2**40), "storage 0 has 64 bytes instead of"),
    "a shape larger than its file": (_shape_only(2**40), r"declares a tensor of shape \(1099511627776,\)"),
    "a shape larger than its storage": (_shape_only(20), r"of shape \(20,\) in a storage of 16 numbers"),
    "rows that are all the same memory": (
        saved({"w": torch.zeros(1).expand(10**6, 10**6)}),
        r"declares a tensor of shape \(1000000, 1000000\), 4000000000000 bytes, in a file of \d+",
    ),
    "the same, in the old format": (
        saved({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, zipped=False),
        "declares a tensor of shape",
    ),
    "a tensor without values": (
        saved({"w": torch.empty(3, device="meta")}),
        "asks for torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "a sparse tensor": (
        saved({"w": torch.zeros(10**5, 10**5, layout=torch.sparse_coo)}),
        "asks for torch._utils._rebuild_sparse_tensor",
    ),
    "an array of a terabyte": (
        with_pickle({"w": _Array((1, (10**12,), np.dtype("f8"), False, b"1234"))}),
        "truncated or damaged",
    ),
    "an array of what was in memory before": (
        with_pickle({"w": Calls(np.ndarray, (10**6,))}),
        "a numpy array without values",
    ),
    "an array with a shape that its bytes do not fill": (
        with_pickle({"w": _Array((1, (10**6, 10**6), np.dtype("f8"), False, bytes(8)))}),
        "cannot reshape array",
    ),
    "an array of objects": (with_pickle({"w": _Array((1, (2,), np.dtype("O"), False, [1, 2]))}), "a numpy dtype 'O8'"),
    "a number type with the state of a record": (
        with_pickle({"w": Calls(np.float64(0).__reduce__()[0], _NumberType((3, "<", [])), b"12")}),
        "truncated or damaged",
    ),
    "a number of another type's bytes": (
        with_pickle({"w": Calls(np.float64(0).__reduce__()[0], np.dtype("f8"), b"12")}),
        "truncated or damaged",
    ),
    "a gigabyte in 410 bytes": (with_pickle({"w": Calls(bytearray, 10**9)}), "asks for builtins.bytearray"),
    "text encoded into a longer text": (
        with_pickle({"w": Calls(codecs.encode, "x" * 1000, "unicode_escape")}),
        "bytes in the encoding 'unicode_escape'",
    ),
    "one text encoded a million times": (_encodings(100_000, 20_000), "more than twice the \\d+ bytes"),
    "10,000 lists in one another": (_of_instructions(b"]" * 10_000 + b"a" * 9_999), "100 deep"),
    "100,000 tuples in one another as a key": (
        _of_instructions(b"})" + b"\x85" * 100_000 + b"K\x01s"),
        "a dict with a tuple as key",
    ),
    "the same key, in the old format": (
        saved(0, zipped=False).replace(b"\x80\x02K\x00.", b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."),
        "a dict with a tuple as key",
    ),
    "more dicts than a checkpoint has": (
        _of_instructions(b"](" + b"}" * 1_100_000 + b"e"),
        "more than 1000000 instructions",
    ),
    "a dict of lists 200 deep": (with_pickle({"meta": _nested(200)}), "100 deep"),
    "a list that holds itself": (with_pickle({"meta": ENDLESS}), "deep, or one that holds itself"),
    "2 ** 60 entries by reference": (with_pickle({"meta": _nested(60, 2)}), "more than 1000000 entries"),
    "a truncated safetensors header": (safetensors_bytes(HEADER, bytes(16), length=10**6), "no whole safetensors"),
    "a header of 2 ** 60 bytes": (safetensors_bytes(HEADER, bytes(16), length=2**60), "no whole safetensors"),
    "a header of no JSON": (safetensors_bytes(b'{"w": {"dtype"', bytes(16)), "no whole safetensors"),
    "a header 100,000 deep": (safetensors_bytes(b'{"w":' * 100_000 + b"1" + b"}" * 100_000), "no whole safetensors"),
    "two tensors in one place": (safetensors_bytes({**HEADER, "v": HEADER["w"]}, bytes(16)), "no whole safetensors"),
}
for _name, _changes in {
    "offsets outside the file": {"data_offsets": [0, 2**50]},
    "offsets backwards": {"data_offsets": [16, 0]},
    "a shape that overflows": {"shape": [2**62, 2**62]},
    "an unknown dtype": {"dtype": "F999"},
}.items():
    _header = {"w": {**HEADER["w"], **_changes}}
    REFUSED[_name] = (safetensors_bytes(_header, bytes(16)), "no whole safetensors")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", REFUSED)
def test_hostile_checkpoints_are_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    path = tmp_path / ("x.safetensors" if "no whole safetensors" in message else "x.pth")
    path.write_bytes(content if isinstance(content, bytes) else content())
    before, start = _memory(), time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - start < 10 and _memory() - before < 300_000_000, "refused before the harm"


def _memory() -> int:
    """The most that this process has had in memory, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_controls_are_read(tmp_path: Path) -> None:
    """The same builders without the harm."""
    path = tmp_path / "x.pth"
    for content in (rezipped(saved(WEIGHTS), {}), _declaring(16), _shape_only(16)):
        path.write_bytes(content)
        torch.testing.assert_close(load_checkpoint(path), WEIGHTS)
    path.write_bytes(with_pickle({"meta": _nested(50), "more": _nested(10, 2)}))
    assert load_checkpoint(path)["meta"] == _nested(50)
    arrays = {
        "c": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        "e": np.zeros((0, 3), dtype=bool),
        "s": np.float32(0.1),
    }
    path.write_bytes(with_pickle(arrays))
    for name, found in load_checkpoint(path).items():
        assert isinstance(found, float if name == "s" else torch.Tensor)
        np.testing.assert_array_equal(found, arrays[name])
    path.write_bytes(safetensors_bytes(HEADER, bytes(16)))
    torch.testing.assert_close(load_checkpoint(path), {"w": torch.zeros(4)})
    shared = torch.zeros(3).expand(4, 3)
    torch.save({"w": shared, "v": [shared, shared]}, path)
    assert load_checkpoint(path)["w"].shape == (4, 3)


def _ways_to_call(target: Path) -> dict[str, Any]:
    text = f"open({str(target)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {target}"),
        "exec": Calls(exec, text),
        "eval": Calls(eval, text),
        "open": Calls(open, str(target), "w"),
        "compile, later": Calls(__import__, "antigravity"),
        "torch.load": Calls(torch.load, str(target)),
        "getattr": Calls(getattr, torch.Tensor, "apply_"),
        "getattr, of what is known": Calls(getattr, OrderedDict, "fromkeys"),
        "sys.exit": Calls(sys.exit, 3),
        "numpy.memmap": Calls(np.memmap, str(target), "uint8", "w+", 0, 8),
    }


@pytest.mark.parametrize("way", _ways_to_call(Path("x")))
@pytest.mark.parametrize("place", ["meta", "state_dict", "key"])
def test_no_way_of_calling_is_followed(tmp_path: Path, way: str, place: str) -> None:
    target, path = tmp_path / "canary", tmp_path / "x.pth"
    call = _ways_to_call(target)[way]
    content = {"state_dict": {"w": torch.zeros(1)}}
    if place == "key":
        content[call] = 1  # type: ignore[index]
    else:
        content[place] = call
    for zipped in (True, False):
        path.write_bytes(saved(content, zipped=zipped))
        with pytest.raises(ValueError, match="was not loaded"):
            load_checkpoint(path)
        assert not target.exists()


def test_control_the_canary_sings(tmp_path: Path) -> None:
    target = tmp_path / "canary"
    for way in ("os.system", "exec", "eval", "open", "numpy.memmap"):
        pickle.loads(pickle.dumps(_ways_to_call(target)[way]))
        assert target.exists(), way
        target.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.to(torch.int8),
            r"another kind of number.*patch_embed\.proj\.weight torch\.int8 for torch\.float32",
        ),
        (lambda w: w.to(torch.complex64), r"complex64 for torch\.float32"),
        (lambda w: w.bool(), r"bool for torch\.float32"),
        (lambda w: torch.full_like(w, float("nan")), r"not finite in 1 tensors, such as patch_embed\.proj\.weight"),
        (lambda w: torch.full_like(w, 1e300, dtype=torch.float64), r"not finite"),
        (lambda w: w[:, :1], r"shapes differ.*patch_embed\.proj\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    model = CastlingViT(embed_dims=16, depth=1, num_heads=2, patch_size=8, img_size=32, out_indices=(0,))
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoilt = {**state, "patch_embed.proj.weight": change(state["patch_embed.proj.weight"])}
    path = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in spoilt.items()}, path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, path)
    torch.testing.assert_close(dict(model.state_dict()), before)
    half = {name: value.half() for name, value in state.items()}
    save_file(half, path)
    load_pretrained(model, path)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, half["patch_embed.proj.weight"].float())


def test_a_state_dict_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content in ({}, {"w": 3}, {"state_dict": 3}, {"state_dict": {"w": [1]}}, {"state_dict": {3: torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="no state dict"):
            select_weights(load_checkpoint(path), path)
