"""What a network is conditioned on, and the one definition of "no condition"."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion.devices import upload

if TYPE_CHECKING:
    from datamodules.base import ImageTable


class Conditioner(ABC):
    """Makes condition vectors: from rows of a data set for training, from prompts for sampling.

    A plain object and not a module, so nothing of it enters a state dict, EMA, DDP or an optimizer. Its constructor
    is light: it reads no weights and no data. The null condition is the zero vector and belongs to the conditioner;
    classifier-free guidance trains and samples its unconditional branch with it.

    Attributes:
        device: where its own networks run, if it has any; the module sets it. Conditions are on the CPU all the same.

    Reference: Ho and Salimans, 2022, arXiv:2207.12598.
    """

    device = torch.device("cpu")

    @property
    @abstractmethod
    def dim(self) -> int:
        """Numbers per condition."""

    @property
    def null(self) -> Tensor:
        """The vector (dim,) that means "no condition": zeros."""
        return torch.zeros(self.dim)

    @abstractmethod
    def prepare(self, table: "ImageTable") -> None:
        """Gets the conditions of all rows of a data set ready for `lookup`.

        Raises:
            AntherError: the data set and the conditioner do not belong together, or something needed is missing.
        """

    @abstractmethod
    def lookup(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Conditions (B, dim), float32, of a training batch, on the batch's device."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditions (n, dim), float32, on the CPU, of n prompts; works without `prepare`.

        Raises:
            AntherError: a prompt cannot be turned into a condition.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for the summary that is printed before training."""

    def drop(self, cond: Tensor, probability: float, uniforms: Tensor) -> Tensor:
        """Replaces whole rows by the null condition, each row independently of the others.

        Dropping single numbers instead would never show the network a null condition: for 512 numbers and p = 0.1
        the chance that all of them vanish together is 1e-512.

        Args:
            cond: conditions (B, dim).
            probability: chance of a row to be dropped, in [0, 1].
            uniforms: (B,) in [0, 1), one draw per row.

        Returns:
            A new tensor (B, dim); each row is the given one or `null`.
        """
        dropped = upload(uniforms < probability, cond.device)
        return torch.where(dropped[:, None], upload(self.null, cond.device, cond.dtype), cond)


class RowTable:
    """Embeddings (N, dim) of all rows of a data set, moved once to the device that asks for them."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __getitem__(self, index: Tensor) -> Tensor:
        if self._rows.device != index.device:
            self._rows = self._rows.to(index.device)
        return self._rows[index]
