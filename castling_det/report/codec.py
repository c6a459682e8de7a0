"""Frozen dataclasses to JSON values and files and back, without loss and without guessing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from castling_det.files import write_json

__all__ = ["from_jsonable", "read_document", "to_jsonable", "write_document"]

RecordT = TypeVar("RecordT")


def write_document(path: str | os.PathLike[str], value: Any, *, schema: str, field: str) -> None:
    """Writes the dataclass `value` as `{"schema": schema, field: ...}`, which `read_document` takes back."""
    write_json(path, {"schema": schema, field: to_jsonable(value, where=field)})


def read_document(
    path: str | os.PathLike[str],
    record_type: type[RecordT],
    *,
    schema: str,
    field: str,
    fix: str,
    older: Mapping[str, Callable[[Any], Any]] | None = None,
) -> RecordT:
    """Reads what `write_document` wrote.

    Args:
        path: the file.
        record_type: the dataclass.
        schema: name and version that the file must have.
        field: as given to `write_document`.
        fix: what to do about another file, for the errors.
        older: earlier schemas that are read too, each with what makes the present form of its JSON value.

    Raises:
        ValueError: not readable JSON, of another schema or version, or a field that does not fit.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}); {fix}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    value = document.get(field) if isinstance(document, dict) else None
    if found != schema:
        modernised = (older or {}).get(str(found))
        if modernised is None:
            raise ValueError(f"{path}: schema={found!r}: expected {schema!r}; {fix}")
        value = modernised(value)
    return from_jsonable(record_type, value, where=field)


def to_jsonable(value: Any, *, where: str = "record") -> Any:
    """The JSON form of dataclasses, mappings with string keys, sequences and scalars.

    Args:
        value: what to encode.
        where: name of `value` in error messages.

    Raises:
        ValueError: NaN or infinity, which JSON has no form for; a type that would not come back as it was.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_jsonable(getattr(value, field.name), where=f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_jsonable(item, where=f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_jsonable(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value}: expected a finite number, or None where there is none")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"{where}: {type(value).__name__} has no JSON form; expected str, int, float, bool or None")


def from_jsonable(record_type: type[RecordT], value: Any, *, where: str = "record") -> RecordT:
    """The inverse of `to_jsonable` for a dataclass: every field is there, none is unknown, every type fits.

    Args:
        record_type: the dataclass.
        value: what `json.load` gave.
        where: name of `value` in error messages, such as the file.

    Raises:
        ValueError: names the field, what it holds and what was expected.
    """
    decoded = _decode(record_type, value, where)
    assert isinstance(decoded, record_type)
    return decoded


def _decode(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_record(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is float:
        _expect(type(value) in (int, float), where, "a number", value)
        return float(value)
    _expect(type(value) is hint, where, getattr(hint, "__name__", str(hint)), value)
    return value


def _decode_record(hint: type[Any], value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, f"an object with the fields of {hint.__name__}", value)
    hints = get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    if sorted(value) != sorted(names):
        missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
        raise ValueError(f"{where}: fields of {hint.__name__} differ: missing {missing}, unknown {unknown}")
    return hint(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    _expect(len(arguments) == len(value), where, f"{len(arguments)} items", value)
    return tuple(
        _decode(argument, item, f"{where}[{index}]")
        for index, (argument, item) in enumerate(zip(arguments, value, strict=True))
    )


def _expect(holds: bool, where: str, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{where}={value!r:.80}: expected {expected}")
