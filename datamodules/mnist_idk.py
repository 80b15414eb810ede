"""MNIST with an eleventh class: the digits that a network should not be sure of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.base import Array, ImageTable, content_digest
from datamodules.mnist import MNIST
from diffusion.errors import AntherError
from diffusion.evaluation.hardness import Judges, hardness, held_out_logits, mistakenness

CRITERIA = ("hardness", "mistakenness")
TRAINED_ON = 60_000


class MNISTWithIDK(MNIST):
    """MNIST whose hardest digits have the label IDK, "I don't know".

    A digit is hard when its score is above the (1 - q) quantile of the training digits' scores. Scores come from
    networks that were not trained on the digit (see `held_out_logits`), so none judges itself, and the quantile never
    looks at the test digits.

    Args:
        quantile: q, the share of the digits that a criterion calls hard, between 0 and 1; seed 001 took 0.2, 0.1, 0.02.
        criteria: hardness, mistakenness or both.
        combine: union, or intersection, of what the criteria call hard.
        judges: how the networks that judge are trained: settings of `Judges`.
        **settings: those of `MNIST`.

    Raises:
        AntherError: no such criterion, or a share that is none.
    """

    def __init__(
        self,
        *,
        quantile: float = 0.2,
        criteria: Sequence[str] = CRITERIA,
        combine: Literal["union", "intersection"] = "union",
        judges: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < quantile < 1:
            raise AntherError(f"data.quantile={quantile} is a share of the digits, between 0 and 1.")
        if not criteria or set(criteria) - set(CRITERIA):
            raise AntherError(f"data.criteria={list(criteria)} must name one or both of {', '.join(CRITERIA)}.")
        if combine not in ("union", "intersection"):
            raise AntherError(f"data.combine is union or intersection, not {combine!r}.")
        self.name = "mnist_idk"
        self.quantile, self.criteria, self.combine = quantile, tuple(criteria), combine
        self.judges = Judges(**(judges or {}))
        self._digits = torch.zeros(0, dtype=torch.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The digits, then IDK."""
        return (*super().class_names, "IDK")

    @property
    def digits(self) -> Tensor:
        """What the digits really are, int64 (N,), whatever their label; after `setup`."""
        self.table  # noqa: B018 - says what is missing
        return self._digits

    def load(self) -> ImageTable:
        """See `ImageDataModule`; trains the networks that judge, where that was not done before."""
        plain = super().load()
        self._digits = plain.labels
        digits = plain.labels.numpy()
        before = (plain.images.shape[-1] - 28) // 2
        native = plain.images[..., before : before + 28, before : before + 28]
        logits = held_out_logits(native, digits, TRAINED_ON, self.judges, plain.digest)
        scores = {"hardness": hardness(logits), "mistakenness": mistakenness(logits, digits)}
        hard = hardest([scores[name] for name in self.criteria], self.quantile, self.combine, TRAINED_ON)
        labels = plain.labels.where(torch.from_numpy(~hard), len(super().class_names))
        digest = content_digest(["mnist_idk", plain.digest], [labels.numpy()])
        return replace(plain, labels=labels, class_names=self.class_names, digest=digest)

    def describe(self) -> str:
        """How many digits are IDK, too."""
        idk = self.table.labels == len(self.class_names) - 1
        shares = ", ".join(f"{int(idk[rows].sum()):,} of {name}" for name, rows in self.splits.items())
        return f"{super().describe()}; IDK: {shares}"


def hardest(scores: Sequence[Array], quantile: float, combine: str, first: int) -> Array:
    """Rows above the (1 - quantile) quantile of the first rows' scores.

    Args:
        scores: one (N,) per criterion.
        quantile: between 0 and 1.
        combine: union or intersection over the criteria.
        first: number of rows that the quantile is taken of.

    Returns:
        bool (N,).
    """
    above = [score > np.quantile(score[:first], 1 - quantile) for score in scores]
    chosen: Array = np.logical_or.reduce(above) if combine == "union" else np.logical_and.reduce(above)
    return chosen
