"""Where two records of settings differ, in words."""

from collections.abc import Iterator, Mapping
from typing import Any


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Says where two nested records differ, naming four settings at most; empty where they do not.

    A setting that is absent is one that is None.
    """
    old, new = dict(_flat("", there)), dict(_flat("", here))
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    shown = ", ".join(f"{key} = {_short(old.get(key))} there and {_short(new.get(key))} here" for key in different[:4])
    return shown + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def _flat(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(f"{name}.{key}" if name else str(key), value)
    else:
        yield name, node
