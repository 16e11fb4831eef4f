"""Strict JSON for frozen dataclasses. Free of torch."""

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from expunge.core.errors import InputError

T = TypeVar("T")


def to_json(record: Any, *, indent: int | None = 2) -> str:
    """Write a dataclass as JSON with sorted keys.

    Indented text ends with one newline; `indent=None` gives one line without it, for JSON lines. NaN is refused.
    """
    text = json.dumps(asdict(record), sort_keys=True, ensure_ascii=False, indent=indent, allow_nan=False)
    return text if indent is None else text + "\n"


def from_json(cls: type[T], text: str) -> T:
    """Read a dataclass back; unknown keys, missing ones whose default is not None, and wrong types raise InputError."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON for {cls.__name__}: {error}") from error
    return from_data(cls, data)


def from_data(cls: type[T], data: Any) -> T:
    """Build a dataclass from parsed JSON with the same strictness as `from_json`."""
    result: T = _decode(cls, data, cls.__name__)
    return result


def _decode(kind: Any, data: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _record(kind, data, where)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _union(args, data, where)
    if origin is Literal:
        return _expect(data in args, data, where, f"one of {', '.join(map(str, args))}")
    if origin is tuple:
        _expect(isinstance(data, list), data, where, "a list")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (dict, Mapping):
        _expect(isinstance(data, dict), data, where, "an object")
        return {key: _decode(args[1], value, f"{where}.{key}") for key, value in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    fits = isinstance(data, kind) and not (kind is int and isinstance(data, bool))
    return _expect(fits, data, where, getattr(kind, "__name__", str(kind)))


def _record(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, where, "an object")
    names = {field.name for field in fields(kind)}
    may_lack = {field.name for field in fields(kind) if field.default is None}  # files of earlier versions lack it
    missing, extra = sorted(names - may_lack - set(data)), sorted(set(data) - names)
    if missing or extra:
        raise InputError(f"{where}: missing keys {missing}, unknown keys {extra}")
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in names & set(data)})


def _union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None:
        return _expect(type(None) in kinds, data, where, "a value")
    rest = [kind for kind in kinds if kind is not type(None)]
    for kind in rest[:-1]:
        try:
            return _decode(kind, data, where)
        except InputError:
            continue
    return _decode(rest[-1], data, where)


def _expect(fits: bool, data: Any, where: str, legal: str) -> Any:
    if not fits:
        raise InputError(f"{where} is {data!r}; legal: {legal}")
    return data
