"""Real images of a split: what drawn ones are held against, and what autoencoders give back."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import AntherError

Array = np.ndarray


@dataclass(frozen=True)
class Reals:
    """Real images, at the size that a model was trained at.

    Attributes:
        pixels: uint8 (M, C, H, W), not augmented.
        rows: of the data table, (M,).
        names: of the images.
        split: which.
        digest: of the data table.
        labels: the class of each; None where the data have none.
    """

    pixels: Tensor
    rows: Array
    names: tuple[str, ...]
    split: str
    digest: str
    labels: tuple[str, ...] | None = None

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
    pixels = torch.cat([datamodule.pixels(name) for name in chosen])
    table = datamodule.table
    names = tuple(table.names[row] for row in rows)
    labels = tuple(table.class_names[k] for k in table.labels[rows].tolist()) if table.class_names else None
    return Reals(pixels, rows, names, split, table.digest, labels)
