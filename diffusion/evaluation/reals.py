"""Real images of a split: what drawn ones are held against, and what autoencoders give back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.images import Images, TableRows

Array = np.ndarray


@dataclass(frozen=True)
class Reals:
    """Real images, at the size that a model was trained at.

    Attributes:
        pixels: uint8 (M, C, H, W), not augmented; read from the table by parts.
        rows: of the data table, (M,).
        names: of the images.
        split: which.
        digest: of the data table.
        labels: the class of each; None where the data have none.
    """

    pixels: Images
    rows: Array
    names: tuple[str, ...]
    split: str
    digest: str
    labels: tuple[str, ...] | None = None

    @property
    def identity(self) -> str:
        """See `identity_of`."""
        return identity_of(self.digest, self.names)

    def spread(self, n: int) -> "Reals":
        """N of them at even distances: files lie in the order of their classes, and the first ones are of few.

        All where there are not as many.
        """
        if n >= len(self.rows):
            return self
        chosen = np.arange(n) * len(self.rows) // n
        return replace(
            self,
            pixels=self.pixels[chosen],
            rows=self.rows[chosen],
            names=tuple(self.names[k] for k in chosen),
            labels=None if self.labels is None else tuple(self.labels[k] for k in chosen),
        )

    def image(self, row: int) -> Tensor:
        """The image of a row of the data table, uint8 (C, H, W)."""
        return self.pixels[int(np.flatnonzero(self.rows == row)[0])]


def identity_of(digest: str, names: Sequence[str]) -> str:
    """Which real images: the same for the same images of the same table, in any order and under any name of a split.

    Args:
        digest: of the data table.
        names: of the images.

    Returns:
        sha256 in hex.
    """
    return hashlib.sha256(json.dumps([digest, sorted(names)]).encode()).hexdigest()


def split_identities(datamodule: Any) -> dict[str, str]:
    """`identity_of` the images of each split, by its name."""
    table, splits = datamodule.table, datamodule.splits
    return {name: identity_of(table.digest, [table.names[row] for row in rows]) for name, rows in splits.items()}


def read_reals(datamodule: Any, split: str) -> Reals:
    """The real images of a split, or of all splits together.

    Raises:
        AntherError: there is no such split.
    """
    splits: dict[str, Array] = datamodule.splits
    if split != "all" and split not in splits:
        raise AntherError(f"the data have the splits {', '.join(splits)} and no {split!r}: choose one of them, or all.")
    chosen = list(splits) if split == "all" else [split]
    rows = np.concatenate([splits[name] for name in chosen])
    table = datamodule.table
    pixels = TableRows(table.images, rows, datamodule.image_shape[1])
    names = tuple(table.names[row] for row in rows)
    labels = tuple(table.class_names[k] for k in table.labels[rows].tolist()) if table.class_names else None
    return Reals(pixels, rows, names, split, table.digest, labels)
