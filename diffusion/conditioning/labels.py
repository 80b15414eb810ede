"""Class labels as the condition, and the search for a class in a prompt."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffusion.conditioning.base import Conditioner
from diffusion.errors import AntherError

if TYPE_CHECKING:
    from datamodules.base import ImageTable


def _forms(word: str) -> set[str]:
    """The word and what it may be the plural of; two words are the same when they share a form."""
    forms = {word}
    if word.endswith("s"):
        forms.add(word[:-1])
    if word.endswith("es"):
        forms.add(word[:-2])
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    return forms


def _words(text: str) -> list[set[str]]:
    return [_forms(word) for word in re.findall(r"[^\W_]+", text.lower())]


def find_class(prompt: str, class_names: Sequence[str]) -> int:
    """Index of the one class that a prompt names, in singular or plural: "a photo of a red rose" names "roses".

    A class inside a longer one does not count: "a desert rose" names "desert-rose" and not "rose". A prompt that is
    only an index of a class is that class, unless a class has that name.

    Raises:
        AntherError: the prompt names no class or several.
    """
    words = _words(prompt)
    hits: list[tuple[int, int, int]] = []
    for k, name in enumerate(class_names):
        wanted = _words(name)
        for start in range(len(words) - len(wanted) + 1):
            if wanted and all(a & b for a, b in zip(words[start:], wanted, strict=False)):
                hits.append((start, start + len(wanted), k))
    outer = [h for h in hits if not any(o[0] <= h[0] and h[1] <= o[1] and o[1] - o[0] > h[1] - h[0] for o in hits)]
    found = sorted({k for _, _, k in outer})
    if len(found) == 1:
        return found[0]
    if not found and prompt.strip().isdecimal() and int(prompt) < len(class_names):
        return int(prompt)
    what = "names no class" if not found else "names several classes (" + ", ".join(class_names[k] for k in found) + ")"
    shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
    raise AntherError(f'the prompt "{prompt}" {what}; name exactly one of: {shown}.')


class Labels(Conditioner):
    """One-hot vectors over the classes of a data set.

    Args:
        class_names: the classes in the order of their labels.
        num_classes: instead of names: the classes are then called "0", "1", ...

    Raises:
        AntherError: neither or both are given.
    """

    def __init__(self, class_names: Sequence[str] | None = None, num_classes: int | None = None) -> None:
        if (class_names is None) == (num_classes is None):
            raise AntherError(
                "the labels conditioner needs its classes: set data.classes or conditioner.class_names=[...], or only "
                "conditioner.num_classes=10, and not both."
            )
        self._numbered = class_names is None
        self.class_names = tuple(str(k) for k in range(num_classes or 0)) if class_names is None else tuple(class_names)

    @property
    def dim(self) -> int:
        """One number per class."""
        return len(self.class_names)

    def prepare(self, table: "ImageTable") -> None:
        """Checks that the data set has these classes in this order.

        Raises:
            AntherError: it has others.
        """
        theirs = tuple(table.class_names)
        if len(theirs) != self.dim or not (self._numbered or theirs == self.class_names):
            raise AntherError(
                f"the conditioner has the {self.dim} classes {_short(self.class_names)} and the data set the "
                f"{len(theirs)} classes {_short(theirs)}; set conditioner.class_names to the data set's."
            )

    def lookup(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One-hot rows (B, dim) of the batch's `label`."""
        return one_hot(batch["label"], self.dim).float()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """One-hot rows (n, dim) of the classes that the prompts name; see `find_class`."""
        return one_hot(torch.tensor([find_class(p, self.class_names) for p in prompts]), self.dim).float()

    def describe(self) -> str:
        """The classes."""
        return f"class labels, one-hot: {_short(self.class_names)}"


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
