"""numpy numbers and arrays out of a pickle that nobody trusts.

numpy's own functions believe what a pickle says of a dtype or an array: a few changed bytes make them read outside of
their memory, and the process ends (seen with numpy 2.2). Here stand-ins take what a pickle calls and check it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["NUMPY_GLOBALS"]

_NUMBERS = frozenset(np.dtype(code).str[1:] for code in "?bBhHiIlLqQefd")


class _NumberType:
    """What `numpy.dtype(...)` in a pickle becomes: a number type, or an error."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(text, str) or text.lstrip("<>|=") not in _NUMBERS:
            raise ValueError(f"a numpy dtype {text!r:.40}; expected a number type")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, and five entries that only records have)
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if order == "<":
            self.dtype = self.dtype.newbyteorder("<")
        elif order == ">":
            self.dtype = self.dtype.newbyteorder(">")
        elif order not in ("|", "="):
            raise ValueError(f"a numpy dtype in the byte order {order!r:.40}; expected <, >, | or =")


class _Array(np.ndarray[Any, Any]):
    """An array that fills itself only with as many bytes as its shape takes."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a numpy array whose state is no tuple of five")
        _, shape, kind, fortran, data = state
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"a numpy array of shape {shape!r:.80}")
        if not isinstance(kind, _NumberType) or not isinstance(data, bytes | bytearray):
            raise ValueError("a numpy array that holds no numbers")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise ValueError(f"a numpy array of shape {shape!r:.80} in {len(data)} bytes")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), bytes(data)))  # type: ignore[arg-type]  # bool is right


def _empty_array(subtype: object, shape: object, code: object) -> _Array:
    # A pickled array is made empty and filled after that; numpy's own function makes it of any size.
    if subtype is not _Array or shape != (0,):
        raise ValueError(f"a numpy array that starts with the shape {shape!r:.40}; expected (0,)")
    return np.empty(0, dtype=np.int8).view(_Array)


def _no_bytes() -> bytes:
    """How the pickles of torch.save call the content of an empty array."""
    return b""


def _scalar(kind: object, data: object) -> np.generic:
    if not isinstance(kind, _NumberType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise ValueError("a numpy number whose bytes are not those of its type")
    number: np.generic = np.frombuffer(data, dtype=kind.dtype)[0]
    return number


NUMPY_GLOBALS: list[tuple[Callable[..., Any], str]] = [
    (_Array, "numpy.ndarray"),
    (_NumberType, "numpy.dtype"),
    (_no_bytes, "builtins.bytes"),
    *(
        (function, f"{module}.{name}")
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2 write different names
        for name, function in (("_reconstruct", _empty_array), ("scalar", _scalar))
    ),
]
"""Stand-ins by the names that pickles call them by, as `torch.serialization.safe_globals` takes them."""
