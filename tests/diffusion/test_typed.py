from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

from diffusion.typed import fits, parameters, words


class Record(TypedDict):
    a: int


@pytest.mark.parametrize(
    ("hint", "good", "wrong"),
    [
        (int, [0, -3], [True, 1.0, "1", None, [1]]),
        (float, [0, 1.5, -2], [True, "1", None, float("nan"), float("inf"), [1.0]]),
        (bool, [True], [0, 1, "true", None]),
        (str, ["", "x"], [1, None, ["x"]]),
        (int | None, [1, None], ["x", 1.5]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0, None]),
        (Sequence[int], [[], [1, 2], (1,)], ["12", 5, [1.5], [[1]], None, {"a": 1}]),
        (tuple[int, ...], [(1, 2), [3]], [3, ["x"]]),
        (tuple[int, int], [(1, 2)], ["12"]),
        (Mapping[str, float], [{}, {"a": 1}], [[], {"a": "x"}, {1: 1.0}, 3]),
        (list[Any], [[], [1, "x"]], ["x", 3]),
        (str | Path, ["x", Path("x")], [3]),
        (Callable[[int], int], [len], [3]),
        (Record, [{"a": 1}], [3, "x", None]),
        (Any, [None, 3, [1]], []),
        (object, [None, 3], []),
        (complex, [1j], ["x", None]),  # any other class takes no plain value of another kind
    ],
    ids=str,
)
def test_values_fit_hints(hint: Any, good: list[Any], wrong: list[Any]) -> None:
    assert all(fits(value, hint) for value in good)
    assert [value for value in wrong if fits(value, hint)] == []


def test_hints_in_words() -> None:
    assert words(float | None) == "a number or null"
    assert words(int | float) == "a number"
    assert words(Literal["a", "b"] | None) == "one of a, b or null"
    assert words(Sequence[int]) == "a list, each of it a whole number"
    assert words(Mapping[str, float]) == "a mapping"


class Base:
    def __init__(self, size: int, name: str = "x") -> None: ...


class Handing(Base):
    def __init__(self, colour: "Unknown" = 1, size: float = 1.0, **options: Any) -> None:  # type: ignore[name-defined] # noqa: F821
        super().__init__(int(size), **options)


class Open(Handing):
    def __init__(self, **options: Any) -> None: ...


def test_what_a_class_takes_and_hands_on() -> None:
    found = parameters(Handing)
    assert found.hints == {"colour": Any, "size": float, "name": str}
    assert found.needed == ()
    assert not found.open_ended
    assert parameters(Base).needed == ("size",)
    assert parameters(Open).hints == found.hints

    def function(a: int = None, *rest: int, **more: int) -> None: ...  # type: ignore[assignment] # noqa: RUF013

    assert parameters(function) == ({"a": int | None}, (), True)
