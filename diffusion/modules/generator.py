"""What draws images: the one thing that sample.py and evaluate.py need of a trained model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion.conditioning.base import Conditioner
from diffusion.editing import Edit
from diffusion.errors import AntherError
from diffusion.guidance import Guidance
from diffusion.modules.base import Module
from diffusion.modules.learning_rate import MakeScheduler
from diffusion.samplers import Hook, Sampler


class Generator(Module, ABC):
    """A LightningModule that draws images by seed, and owns one network.

    Args:
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps) -> Lightning's `lr_scheduler` config; see `modules.learning_rate`.
        seed: of everything that is drawn in training and validation.

    Attributes:
        conditioner: prompts -> conditions; None for a model that takes no prompts.
        sampler: draws unless another is given; None for a model that draws in one call.
        weight: guidance weight of `sample`; None for a model that is not guided.
        config: the resolved config of the run; the entry point sets it, checkpoints carry it.
    """

    conditioner: Conditioner | None = None
    sampler: Sampler | None = None
    weight: float | None = None

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: MakeScheduler | None,
        seed: int,
    ) -> None:
        super().__init__(seed)
        self.config: dict[str, Any] = {}
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network: what is optimised, averaged and counted, and whose layers give embeddings."""

    @property
    def bottleneck(self) -> str:
        """The layer of the network that stands for an image unless another is named.

        Raises:
            AntherError: the network names none.
        """
        layer = getattr(self.trained, "bottleneck", None)
        if not isinstance(layer, str):
            raise AntherError(
                f"{type(self.trained).__name__} does not say which of its layers stands for an image: name one in "
                "embedding.layer."
            )
        return layer

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""

    @property
    def T(self) -> int | None:  # noqa: N802
        """Steps of the schedule; None for a model without one."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What a person wants to know before the run, by heading."""

    @abstractmethod
    def check_request(
        self, prompts: Sequence[str] | None, n: int, weight: float | None = None, guidance: Guidance | None = None
    ) -> None:
        """Finds out whether `sample` can do what it would be asked for.

        Args:
            prompts: n of them, or None.
            n: number of images.
            weight: guidance weight, or None.
            guidance: all about it but the weight, or None.

        Raises:
            AntherError: prompts or a weight for a model that takes none, or prompts that are missing or not understood.
        """

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        weight: float | Tensor | None = None,
        sampler: Sampler | None = None,
        hook: Hook | None = None,
        guidance: Guidance | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Draws one image per seed; image k is a function of its seed, prompt and weight in any batch split.

        Args:
            prompts: one per seed; None without a condition.
            seeds: one per image.
            weight: guidance weight w, for all or one per image (n,); None takes the model's own.
            sampler: instead of the model's own.
            hook: called after each step of the sampler.
            guidance: all about it but the weight; None takes the model's own.
            edit: an image that is drawn anew; None draws from noise alone.

        Returns:
            (n, C, H, W), on the module's device; nominally in [-1, 1], not clamped.
        """

    @abstractmethod
    def look_at(self, images: Tensor, prompts: Sequence[str] | None) -> None:
        """Shows drawn images (n, C, H, W) to the network as clean ones, so that hooks on its layers see them."""

    def configure_optimizers(self) -> Any:
        """The optimizer over the network, and how its rate moves."""
        optimizer = self._make_optimizer(p for p in self.trained.parameters() if p.requires_grad)
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer, self.total_steps)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says what it is: the resolved config travels with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = self.config

    def places(self, n: int, batch_idx: int) -> tuple[int, list[int]]:
        """Where this process's n samples stand in the batch of the optimizer's step.

        What is drawn for a sample is a function of (seed, step, place), so the same batch on other numbers of devices,
        or gathered over several accumulated batches, trains the same network, unless its layers draw, too.

        Args:
            n: samples of this process's batch.
            batch_idx: of the batch in its epoch.

        Returns:
            Samples of the whole batch, and n different places below that number.
        """
        trainer = self.trainer
        parts, ranks = trainer.accumulate_grad_batches, trainer.world_size
        # A smaller batch may end an epoch; its samples have the first places of a whole one.
        whole = getattr(getattr(trainer, "datamodule", None), "batch_size", n)
        # The loaders deal the samples of a step to the ranks in turn.
        places = ((batch_idx % parts) * whole + torch.arange(n)) * ranks + self.global_rank
        return parts * whole * ranks, places.tolist()
