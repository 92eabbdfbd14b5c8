"""Frozen dataclasses as JSON knows them, and back, by their fields and their types.

What a dataclass holds is found in its fields, so that none can be forgotten: numbers,
texts, tuples, arrays, mappings, and dataclasses of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

_Value = TypeVar("_Value")


def to_values(value: object) -> Any:
    """Return a value as JSON knows it; keys of mappings become texts."""
    if is_dataclass(value):
        return {f.name: to_values(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_values(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_values(item) for item in value]
    return value


def from_values(of: type[_Value], values: Mapping[str, Any]) -> _Value:
    """Read what `to_values` returned of a dataclass, after a way through JSON.

    Raises
    ------
    ValueError
        The values are those of another dataclass, or of another version of it.
    """
    hints = get_type_hints(of)
    # What an earlier version did not know it did not do, or did not say.
    unknown = {
        f.name: f.default
        for f in fields(of)  # type: ignore[arg-type]
        if f.default is False or f.default is None
    }
    given = {**unknown, **values}
    names = [field.name for field in fields(of)]  # type: ignore[arg-type]
    if differing := sorted({*names} ^ {*given}):
        raise ValueError(f"{of.__name__}: {', '.join(differing)}")
    return of(**{name: _read(hints[name], given[name]) for name in names})


def _read(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        (known,) = (kind for kind in arguments if kind is not type(None))
        return None if value is None else _read(known, value)
    if origin is np.ndarray:
        (element,) = get_args(arguments[1])
        return np.array(value, element)
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return {key(k): _read(item, v) for k, v in value.items()}
    return from_values(hint, value) if is_dataclass(hint) else value  # type: ignore[arg-type]
