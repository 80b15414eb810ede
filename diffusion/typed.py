"""Plain values against type hints: what a config says, held against what a part says it takes."""

import collections.abc
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SCALARS = (str, int, float, type(None))
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where a hint asks for its kind; a hint that says nothing of plain values fits all.

    A number is finite, a whole number is no number with a point and neither is true or false, and text is no list.
    """
    if hint in (Any, object):
        return True
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
    if typing.is_typeddict(hint):
        return isinstance(value, Mapping)
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


class Parameters(NamedTuple):
    """What a call takes by name.

    Attributes:
        hints: of every parameter by its name; `Any` where there is none, or none that can be had here: some name what
            is imported for checkers alone.
        needed: those without a default.
        open_ended: whether it takes others, too.
    """

    hints: dict[str, Any]
    needed: tuple[str, ...]
    open_ended: bool


@functools.lru_cache
def parameters(call: Callable[..., Any]) -> Parameters:
    """What a function takes by name, or a class; `**options` are those of the next class that says what it takes.

    A parameter whose default is None takes None, whatever its hint says.
    """
    found: dict[str, Any] = {}
    needed: list[str] = []
    open_ended = True
    owners = (
        [vars(kind)["__init__"] for kind in call.__mro__ if "__init__" in vars(kind)]
        if inspect.isclass(call)
        else [call]
    )
    for owner in owners:
        names = vars(inspect.getmodule(inspect.unwrap(owner)) or typing)
        mine = list(inspect.signature(owner).parameters.values())[1 if inspect.isclass(call) else 0 :]
        for parameter in mine:
            if parameter.kind in _NAMELESS or parameter.name in found:
                continue
            found[parameter.name] = _hint(parameter, names)
            # What a base class needs, the class may give it itself.
            if parameter.default is parameter.empty and owner is owners[0]:
                needed.append(parameter.name)
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine)
        if not open_ended:
            break
    return Parameters(found, tuple(needed), open_ended)


_NAMELESS = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


def _hint(parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    if parameter.annotation is parameter.empty:
        return Any
    holder = type("_", (), {"__annotations__": {parameter.name: parameter.annotation}})
    try:
        hint = typing.get_type_hints(holder, dict(names))[parameter.name]
    except (NameError, AttributeError, TypeError):
        return Any
    return hint | None if parameter.default is None and hint is not Any else hint


def short(value: Any) -> str:
    """A value for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."


def _one_of(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
