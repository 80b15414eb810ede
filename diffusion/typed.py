"""Plain values against type hints: what a config says, held against what a part says it takes."""

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SCALARS = (str, int, float, type(None))
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where a hint asks for its kind; a hint that says nothing of plain values fits all.

    A number is finite, a whole number is no number with a point and neither is true or false, and text is no list.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in _LISTS:
        parts = (*(part for part in parts if part is not Ellipsis), Any)[:1]
        if isinstance(value, list | tuple):
            return all(fits(entry, parts[0]) for entry in value)
        return not isinstance(value, (*_SCALARS, Mapping))
    if origin in _MAPPINGS:
        key, entry = parts or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, entry) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | Path)
    if hint in (bool, str, list, tuple, dict, type(None)):
        return isinstance(value, hint if hint not in (list, tuple) else (list, tuple))
    if origin is collections.abc.Callable:
        return callable(value)
    if inspect.isclass(hint) and not issubclass(hint, Enum) and isinstance(value, _SCALARS):
        return isinstance(value, hint)
    return True


def words(hint: Any) -> str:
    """What a hint asks for, as one says it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        whole = [part for part in parts if not (part is int and float in parts)]
        literals = [str(value) for part in whole if get_origin(part) is Literal for value in get_args(part)]
        others = [words(part) for part in whole if get_origin(part) is not Literal]
        return " or ".join([*([_one_of(literals)] if literals else []), *dict.fromkeys(others)])
    if origin is Literal:
        return _one_of([str(part) for part in parts])
    if origin in _LISTS:
        entries = [part for part in parts if part is not Ellipsis]
        return f"a list, each of it {words(entries[0])}" if entries and entries[0] in _NAMES else "a list"
    if origin in _MAPPINGS or hint is dict:
        return "a mapping"
    if hint is Path:
        return "a path"
    return _NAMES.get(hint) or f"a {getattr(hint, '__name__', str(hint))}"


def hints(call: Callable[..., Any]) -> dict[str, Any]:
    """The hints of a call's parameters, of those that can be had: some name what is imported for checkers alone.

    A parameter whose default is None takes None, whatever its hint says.
    """
    found: dict[str, Any] = {}
    owner = call.__init__ if inspect.isclass(call) else call
    names = vars(inspect.getmodule(inspect.unwrap(owner)) or typing)
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.annotation is inspect.Parameter.empty:
            continue
        holder = type("_", (), {"__annotations__": {name: parameter.annotation}})
        try:
            hint = typing.get_type_hints(holder, dict(names))[name]
        except (NameError, AttributeError, TypeError):
            continue
        found[name] = hint | None if parameter.default is None and hint is not Any else hint
    return found


def short(value: Any) -> str:
    """A value for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."


def _one_of(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
